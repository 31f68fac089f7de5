"""The version that a request gets."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from tnxctl.protocol.wire import TensorSpec
from tnxd.deployment.registry import Deployment, Registry
from tnxd.deployment.traffic import check_weights, signature_difference
from tnxd.deployment.version import DRAINING, EVICTED, FAILED, READY, Version
from tnxd.models.catalog import Entry
from tnxd.models.model import Model


def model(name: str, version: str, **changes: object) -> Model:
    signature = {
        "inputs": (TensorSpec("x", "FP32", (-1, 4)),),
        "outputs": (TensorSpec("y", "FP32", (-1, 2)),),
        "max_batch_size": 8,
        **changes,
    }
    return Model(name=name, version=version, factory=object, **signature)  # type: ignore[arg-type]


@dataclass(frozen=True)
class FakeSource:
    name: str
    version: str
    format: str = "built-in"
    stamp: str = ""
    nbytes: int = 0

    def open(self, generation: int) -> Model:
        return model(self.name, self.version)


def deployment(name: str, *versions: str) -> Deployment:
    made = Deployment(Entry(name, {number: FakeSource(name, number) for number in versions}, wanted=versions), {})
    for number in versions:
        version = Version(made.entry.sources[number])
        version.state, version.model = READY, model(name, number)
        made.put(version)
    return made


def registry(*deployments: Deployment, default: str = "") -> Registry:
    made = Registry(default)
    made.deployments = {each.name: each for each in deployments}
    made.rebuild()
    return made


def found(registry: Registry, name: str, client: bytes = b"c", key: str = "") -> str:
    return registry.find(name, client, key).title


def test_the_newest_version_answers_and_each_can_be_named() -> None:
    made = registry(deployment("net", "2", "10", "9"), deployment("other", "1"))
    assert found(made, "net") == "net@10"
    assert found(made, "") == "net@10"
    assert found(made, "net@2") == "net@2"
    assert found(made, "other") == "other@1"


def test_what_cannot_answer_says_why() -> None:
    made = registry(deployment("net", "1", "2"), deployment("bad", "1"))
    made.failures = {"typo": "typo/model.toml: not TOML", "net@4": "net/4: no model file"}
    made.deployments["net"].versions["2"].state = FAILED
    made.deployments["net"].versions["2"].error = "model.pt2 is cut short"
    made.deployments["bad"].versions["1"].state = DRAINING
    made.rebuild()
    assert found(made, "net") == "net@1"
    for name, error, words in [
        ("net@2", FailedPrecondition, "model.pt2 is cut short"),
        ("net@3", NotFound, "no version '3'; there are 1, 2"),
        ("net@4", FailedPrecondition, "no model file"),
        ("none", NotFound, "no model 'none'; there are net, bad"),
        ("typo", FailedPrecondition, "not TOML"),
        ("bad", FailedPrecondition, "draining"),
        ("net@", InvalidArgument, "'net@'"),
    ]:
        with pytest.raises(error, match=words):
            made.find(name, b"c", "")


def test_a_version_that_is_being_loaded_is_to_be_asked_again() -> None:
    made = registry(deployment("net", "1"))
    version = made.deployments["net"].versions["1"]
    version.state, version.error, version.loading = FAILED, "model.pt2 is cut short", True
    made.rebuild()
    with pytest.raises(Unavailable, match="'net@1' is still being loaded") as caught:
        found(made, "net")
    assert caught.value.retry_after_s
    version.loading = False
    with pytest.raises(FailedPrecondition, match="is cut short"):
        found(made, "net")


def test_the_default_is_none_that_cannot_serve_unless_it_is_configured() -> None:
    made = registry(deployment("a", "1"), deployment("b", "1"))
    first = made.deployments["a"].versions["1"]
    assert made.default == "a"
    first.state = FAILED
    made.rebuild()
    assert (made.default, found(made, "")) == ("b", "b@1")
    first.state = EVICTED  # it is loaded for a request
    made.rebuild()
    assert (made.default, found(made, "")) == ("a", "a@1")
    chosen = registry(deployment("a", "1"), deployment("b", "1"), default="b")
    chosen.deployments["b"].versions["1"].state = FAILED
    chosen.deployments["b"].versions["1"].error = "model.pt2 is cut short"
    chosen.rebuild()
    with pytest.raises(FailedPrecondition, match="is cut short"):
        chosen.find("", b"c", "")


def test_an_evicted_version_keeps_its_traffic_and_a_failed_one_loses_it() -> None:
    made = registry(deployment("net", "1", "2"))
    made.deployments["net"].versions["2"].state = EVICTED
    made.rebuild()
    assert found(made, "net") == "net@2"
    made.deployments["net"].versions["2"].state = FAILED
    made.rebuild()
    assert found(made, "net") == "net@1"


@given(st.integers(1, 99), st.integers(1, 99), st.integers(0, 2**32))
def test_traffic_is_split_by_weight_and_stays_with_its_key(first: int, second: int, seed: int) -> None:
    net = deployment("net", "1", "2")
    net.weights = {"1": float(first), "2": float(second)}
    made = registry(net)
    keys = [f"user-{seed}-{number}" for number in range(400)]
    before = {key: found(made, "net", key=key) for key in keys}
    assert before == {key: found(made, "net", client=b"another", key=key) for key in keys}
    share = Counter(before.values())["net@2"] / len(keys)
    assert abs(share - second / (first + second)) < 0.15
    assert net.traffic(net.versions["2"]) == pytest.approx(second / (first + second))
    # Who is on the version whose share grows stays there.
    net.weights["2"] = float(second * 2)
    made.rebuild()
    for key, title in before.items():
        if title == "net@2":
            assert found(made, "net", key=key) == title


def test_without_a_key_a_client_stays_with_its_version() -> None:
    net = deployment("net", "1", "2")
    net.weights = {"1": 1.0, "2": 1.0}
    made = registry(net)
    titles = set()
    for number in range(50):
        client = number.to_bytes(5, "big")
        first = found(made, "net", client)
        assert found(made, "net", client) == first
        titles.add(first)
    assert titles == {"net@1", "net@2"}


def test_the_share_of_a_version_that_has_gone_falls_to_the_others() -> None:
    net = deployment("net", "1", "2", "3")
    net.weights = {"1": 50.0, "2": 50.0}
    made = registry(net)
    net.versions["1"].state = FAILED
    made.rebuild()
    assert {found(made, "net", key=str(number)) for number in range(50)} == {"net@2"}
    net.versions["2"].state = FAILED
    made.rebuild()
    assert found(made, "net") == "net@3"


def test_the_shadow_of_versions_that_answer() -> None:
    net = deployment("net", "1", "2", "3")
    net.weights, net.shadow = {"1": 50.0, "2": 50.0}, "3"
    made = registry(net)
    shadow = net.versions["3"]
    assert [made.shadow_of.get(version) for version in net.versions.values()] == [shadow, shadow, None]
    shadow.state = EVICTED
    made.rebuild()
    assert net.versions["1"] not in made.shadow_of


def test_the_newest_version_does_not_answer_while_it_is_the_shadow() -> None:
    net = deployment("net", "1", "2")
    net.shadow = "2"
    made = registry(net)
    assert found(made, "net") == "net@1"
    assert made.shadow_of[net.versions["1"]] is net.versions["2"]


def test_a_split_is_checked() -> None:
    net = deployment("net", "1", "2", "3")
    net.versions["3"].model = model("net", "3", inputs=(TensorSpec("x", "FP32", (-1, 5)),))
    check_weights(net, {"1": 95, "2": 5}, "")
    check_weights(net, {"3": 1}, "")
    check_weights(net, {"1": 1}, "2")
    with pytest.raises(FailedPrecondition, match="differ"):
        check_weights(net, {}, "2")
    for weights, shadow, error, words in [
        ({"4": 1.0}, "", NotFound, "no version '4'"),
        ({"1": 0.0}, "", InvalidArgument, "above 0"),
        ({"1": 1.0}, "1", InvalidArgument, "both answer and be the shadow"),
        ({"1": 1.0, "3": 1.0}, "", FailedPrecondition, r"shape \[-1, 5\] instead of \[-1, 4\]"),
        ({"1": 1.0}, "3", FailedPrecondition, "differ"),
    ]:
        with pytest.raises(error, match=words):
            check_weights(net, weights, shadow)
    net.versions["2"].state = DRAINING
    with pytest.raises(FailedPrecondition, match="draining"):
        check_weights(net, {"2": 1.0}, "")


def test_signatures_may_widen_their_inputs_but_not_change() -> None:
    old = model("net", "1")
    assert not signature_difference(old, model("net", "2"))
    assert not signature_difference(old, model("net", "2", inputs=(TensorSpec("x", "FP32", (-1, -1)),)))
    for changes, words in [
        ({"inputs": (TensorSpec("z", "FP32", (-1, 4)),)}, "['z'] instead of ['x']"),
        ({"inputs": (TensorSpec("x", "FP64", (-1, 4)),)}, "FP64 instead of FP32"),
        ({"outputs": (TensorSpec("y", "FP32", (-1, 3)),)}, "[-1, 3] instead of [-1, 2]"),
        ({"outputs": (TensorSpec("y", "FP32", (-1, -1)),)}, "[-1, -1] instead of [-1, 2]"),
        ({"inputs": (TensorSpec("x", "FP32", (-1, 4, 1)),)}, "[-1, 4, 1]"),
    ]:
        assert words in signature_difference(old, model("net", "2", **changes))


def test_evictions_of_versions_that_have_gone_are_forgotten_unless_they_are_known_otherwise() -> None:
    made = registry(deployment("net", "1"))
    made.evictions.update(["net@1", "known@1", *(f"gone-{number}@1" for number in range(2000))])
    made.forget_evictions({"known@1"})
    assert made.evictions == {"net@1": 1, "known@1": 1}
