"""Texts of all lengths through a running daemon: padded, packed, and apart where padding would change an answer."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import pytest

import ragged_models as models
from conftest import Daemon, serving_daemon
from daemons import freeze
from tnxctl import Client, Result
from tnxctl.protocol.errors import DeadlineExceeded, InvalidArgument

LENGTHS = (3, 5, 9, 17, 33, 4, 64, 1, 5)


@dataclass(frozen=True)
class Serving:
    daemon: Daemon
    tnx: Client


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("ragged")
    root = folder / "models"
    models.put(root, "masked", "Slow", models.PADDED)
    models.put(root, "recurrent", "Recurrent", models.PADDED)
    models.put(root, "packed", "Packed", models.PACKED, outputs=models.MEAN)
    models.put(root, "crosstalk", "Crosstalk", models.PACKED, outputs=models.MEAN)
    models.put(root, "short", "Short", models.PADDED)
    models.put(root, "misplaced", "Masked", models.PADDED.replace("tokens = 1", "tokens = 2"))
    with (
        serving_daemon(folder / "log", "--model-repository", str(root), "--cpu-workers", "1") as running,
        Client(running.endpoint, timeout=60.0) as tnx,
    ):
        yield Serving(running, tnx)


def submitted(serving: Serving, model: str) -> list[tuple[int, Result]]:
    """Results of texts that were sent at a time, to a daemon that stands still meanwhile."""
    freeze(serving.daemon.process)
    try:
        futures: list[tuple[int, Future[Result]]] = [
            (length, serving.tnx.submit(models.text(length, length), model=model)) for length in LENGTHS
        ]
    finally:
        serving.daemon.process.send_signal(signal.SIGCONT)
    return [(length, future.result()) for length, future in futures]


def shared(serving: Serving, model: str) -> list[tuple[int, Result]]:
    """The same, in which some shared a batch with others of another length: of each length there are two at most."""
    for _ in range(20):  # the first texts may run before the others have come
        found = submitted(serving, model)
        if max(result.batch_size for _, result in found) > 2:
            return found
    raise AssertionError("no texts of different lengths have shared a batch")


def test_texts_of_different_lengths_share_a_batch_and_get_their_own_answers(serving: Serving) -> None:
    found = shared(serving, "masked")
    for length, result in found:
        assert result.outputs["mean"][0] == pytest.approx(models.mean(length, length), abs=1e-6)
        tokens = result.outputs["tokens"]
        assert tokens.shape == (1, length, 4)  # cut back
        assert np.array_equal(tokens[0], 2 * models.TABLE[models.text(length, length)["ids"][0]])


def test_a_request_of_several_rows_is_cut_back_as_a_whole(serving: Serving) -> None:
    several = {name: np.repeat(array, 3, 0) for name, array in models.text(7).items()}
    futures = [serving.tnx.submit(models.text(40), model="masked"), serving.tnx.submit(several, model="masked")]
    futures.append(serving.tnx.submit(models.text(21), model="masked"))
    shapes = [future.result().outputs["tokens"].shape for future in futures]
    assert shapes == [(1, 40, 4), (3, 7, 4), (1, 21, 4)]


def test_a_recurrent_network_that_is_not_told_lengths_is_not_padded(serving: Serving) -> None:
    for length, result in submitted(serving, "recurrent"):
        alone = serving.tnx.predict(models.text(length, length), model="recurrent")
        assert result.outputs["mean"] == pytest.approx(alone.outputs["mean"], abs=1e-6)
        assert result.batch_size <= LENGTHS.count(length)
    (listed,) = [one for one in serving.tnx.models() if one.name == "recurrent"]
    assert any(
        note.startswith("not padded, so that only requests of equal lengths share a batch") for note in listed.notes
    )
    serving.daemon.logged("recurrent@1: requests of different lengths do not share batches")


def test_packed_texts_share_a_batch_bit_for_bit(serving: Serving) -> None:
    alone = {length: serving.tnx.predict(models.text(length, length), model="packed") for length in LENGTHS}
    for length, result in shared(serving, "packed"):
        assert np.array_equal(result.output, alone[length].output)
        assert result.output[0] == pytest.approx(models.mean(length, length), abs=1e-6)


def test_padding_of_the_client_s_own_is_not_packed(serving: Serving) -> None:
    own = {name: np.pad(array, ((0, 0), (0, 5))) for name, array in models.text(6).items()}
    assert serving.tnx.predict(own, model="packed").output[0] == pytest.approx(models.mean(6), abs=1e-6)


@pytest.mark.parametrize("model", ["packed", "masked"])
def test_a_text_without_a_token_gets_an_answer(serving: Serving, model: str) -> None:
    nothing = {name: np.zeros((1, 3), np.int64) for name in ("ids", "mask")}
    result = serving.tnx.predict(nothing, model=model)
    assert not result.outputs["mean"].any()


@pytest.mark.parametrize(
    ("model", "change", "complaint"),
    [
        (
            "masked",
            {"mask": np.ones((1, 4), np.int64)},
            "'mask' is 4 long along axis 1, 'ids' is 6: they count the same",
        ),
        ("packed", {"mask": np.array([[1, 1, 0, 1, 1, 1]])}, "the mask of row 0 has a token behind padding"),
        ("recurrent", models.text(65), "is 65 long; it takes 64"),
    ],
)
def test_a_request_that_contradicts_itself_gets_one_error(
    serving: Serving, model: str, change: dict[str, models.Array], complaint: str
) -> None:
    with pytest.raises(InvalidArgument, match=complaint):
        serving.tnx.predict({**models.text(6), **change}, model=model)
    assert serving.tnx.predict(models.text(6), model=model).batch_size == 1


def test_deadlines_hold_among_all_lengths(serving: Serving) -> None:
    """Each is answered in time, or told that it will not be; nothing is lost."""
    futures = [
        serving.tnx.submit(models.text(length), model="masked", deadline=0.03 if number % 3 else None)
        for number, length in enumerate(LENGTHS * 6)
    ]
    answered = 0
    for future, length in zip(futures, LENGTHS * 6, strict=True):
        try:
            result = future.result()
        except DeadlineExceeded:
            continue
        answered += 1
        assert result.outputs["mean"][0] == pytest.approx(models.mean(length), abs=1e-6)
    assert answered >= len(LENGTHS) * 2  # those that had all the time there is


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("crosstalk", "axis 0 does not count rows"),
        ("short", r"short/model.toml: ragged.max_length: 64, but 1 row of length 64: "),
        ("misplaced", "misplaced/model.toml: ragged.outputs.tokens: axis 2 always has length 4"),
    ],
)
def test_what_cannot_be_served_says_why(serving: Serving, model: str, why: str) -> None:
    (listed,) = [one for one in serving.tnx.models() if one.name == model]
    assert listed.status == "failed"
    assert why in " ".join([listed.error, *listed.notes])
