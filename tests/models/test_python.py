"""Models in plain Python: what a model.py has to be, and how its class is called."""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from python_models import DOUBLES, SIGNATURE, opened, put, rows, source
from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition, Internal, InvalidArgument, TensorNextError
from tnxctl.protocol.strings import array_of
from tnxd.models import repository
from tnxd.models.formats.modules import is_private
from tnxd.models.python.failures import ProcessAway

TWO = """
inputs = [{ name = "x", datatype = "FP32", shape = [-1, 2] }, { name = "scale", datatype = "FP32", shape = [-1] }]
outputs = [{ name = "y", datatype = "FP32", shape = [-1, 2] }, { name = "n", datatype = "INT64", shape = [-1] }]
"""


def ask(root: Path, text: str, *inputs: Array | None, settings: str = "", signature: str = SIGNATURE) -> list[Array]:
    """The answer of a model.py in this process."""
    module = opened(root, text, settings=settings, signature=signature).factory().to("cpu")
    answer = module(*[None if array is None else torch.from_numpy(array) for array in inputs or (rows(1, 2),)])
    return [tensor.numpy() for tensor in answer]


# --- how it is called ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "returned",
    ['{"y": x * 2}', '{"y": x * 2, "more": 1}', "x * 2", "(x * 2,)", "[x * 2]", "Named(x * 2)", "Data(x * 2)"],
)
def test_outputs_come_by_name_in_order_or_alone(tmp_path: Path, returned: str) -> None:
    text = f"""
    import dataclasses, typing
    class Named(typing.NamedTuple):
        y: object
    @dataclasses.dataclass
    class Data:
        y: object
    class Model:
        def predict(self, x):
            return {returned}
    """
    np.testing.assert_array_equal(ask(tmp_path, text)[0], rows(2, 4))


def test_load_is_told_where_the_files_are_and_what_model_toml_says(tmp_path: Path) -> None:
    text = """
    import numpy as np
    from .helper import one
    class Model:
        def load(self, context):
            assert (context.name, context.version, context.device) == ("odd", "1", "cpu")
            self.add = np.load(context.directory / "add.npy") + context.config["add"] + one()
        def predict(self, x):
            return x + self.add
    """
    place = put(tmp_path, text)
    np.save(place / "add.npy", np.float32(10))
    (place / "helper.py").write_text("def one():\n    return 1\n")
    config = "config = { add = 5 }"
    assert ask(tmp_path, text, settings=config)[0].tolist() == [[17.0, 17.0], [18.0, 18.0]]


def test_strings_are_prepared_and_finished_one_by_one(tmp_path: Path) -> None:
    text = """
    class Model:
        def preprocess(self, x):
            assert type(x) is bytes
            return {"texts": x.decode(), "raw": x}
        def predict(self, texts, raw):
            assert [text.encode() for text in texts] == raw.tolist()
            return raw
        def postprocess(self, raw):
            assert type(raw) is bytes
            return raw + b"!\\0"
    """
    signature = """
    inputs = [{ name = "x", datatype = "BYTES", shape = [-1] }]
    outputs = [{ name = "y", datatype = "BYTES", shape = [-1] }]
    """
    module = opened(tmp_path, text, signature=signature).factory().to("cpu")
    for elements in ([b"a"], [b"a\0", b"", "\xf6".encode() * 9]):
        (answer,) = module(array_of(elements, (len(elements),)))
        assert answer.tolist() == [element + b"!\0" for element in elements]


def test_rows_are_prepared_and_finished_one_by_one(tmp_path: Path) -> None:
    text = """
    import threading
    class Model:
        def preprocess(self, x, scale):
            assert x.shape == (2,) and scale.shape == ()
            return {"scaled": x * scale, "count": 1}
        def predict(self, scaled, count):
            assert scaled.shape == (3, 2) and count.tolist() == [1, 1, 1]
            return {"a": scaled + 1, "b": count}
        def postprocess(self, a, b):
            assert a.shape == (2,)
            return {"n": b + 1, "y": a}
    """
    scale = np.array([1, 10, 100], np.float32)
    y, n = ask(tmp_path, text, rows(1, 2, 3), scale, signature=TWO)
    assert y.tolist() == [[2, 2], [21, 21], [301, 301]]
    assert n.tolist() == [2, 2, 2]


def test_what_is_raised_for_a_row_is_raised_and_threads_end_with_the_model(tmp_path: Path) -> None:
    text = """
    import threading
    class Model:
        def preprocess(self, x):
            if x[0] == 2: raise SystemExit("two")
            return {"name": len([t for t in threading.enumerate() if t.name == "odd@1"])}
        def predict(self, name):
            return name[:, None].astype("float32").repeat(2, 1)
    """
    module = opened(tmp_path, text).factory().to("cpu")
    with pytest.raises(SystemExit, match="two"):
        module(torch.from_numpy(rows(1, 2, 3)))
    threads = [thread for thread in threading.enumerate() if thread.name == "odd@1"]
    assert module(torch.from_numpy(rows(1, 3)))[0][0, 0] == len(threads)
    assert all(thread.daemon for thread in threads)
    del module
    gc.collect()
    for thread in threads:
        thread.join()


def test_a_request_without_rows_is_prepared_as_it_is(tmp_path: Path) -> None:
    text = """
    class Model:
        def preprocess(self, x):
            return {"x": x + 1}
        def predict(self, x):
            return x
        def postprocess(self, x):
            return x * 2
    """
    assert ask(tmp_path, text, rows(1), settings="max_batch_size = 0")[0].tolist() == [[4.0, 4.0]]


def test_an_argument_with_a_default_makes_an_optional_input(tmp_path: Path) -> None:
    text = """
    class Model:
        def predict(self, x, scale=None):
            return x if scale is None else x * scale[:, None], (x[:, 0] > 0).astype("int64")
    """
    assert opened(tmp_path, text, signature=TWO).optional == {"scale": None}
    assert ask(tmp_path, text, rows(3), None, signature=TWO)[0].tolist() == [[3, 3]]


def test_torch_gets_tensors_and_may_return_either(tmp_path: Path) -> None:
    text = """
    import torch
    class Model:
        framework = "torch"
        def predict(self, x, scale):
            assert isinstance(x, torch.Tensor)
            return {"y": x * scale[:, None], "n": scale.numpy().astype("int64")}
    """
    y, n = ask(tmp_path, text, rows(1, 2), np.array([2, 3], np.float32), signature=TWO)
    assert (y.tolist(), n.tolist()) == ([[2, 2], [6, 6]], [2, 3])


def test_outputs_that_a_model_keeps_are_copied(tmp_path: Path) -> None:
    text = """
    import numpy as np
    class Model:
        def load(self, context):
            self.kept = np.zeros((2, 2), np.float32)
        def predict(self, x):
            np.multiply(x, 2, out=self.kept)
            return self.kept
    """
    module = opened(tmp_path, text).factory().to("cpu")
    first = module(torch.from_numpy(rows(1, 2)))[0]
    module(torch.from_numpy(rows(7, 8)))
    assert first.tolist() == [[2, 2], [4, 4]]


def test_code_beside_another_file_is_no_model(tmp_path: Path) -> None:
    place = put(tmp_path, DOUBLES)
    (place / "model.onnx").write_bytes(b"")
    assert repository.scan(tmp_path).entries["odd"].sources["1"].format == "onnx"


def test_replicas_that_all_hang_are_not_waited_for(tmp_path: Path) -> None:
    text = """
    import threading
    entered, leave = threading.Event(), threading.Event()
    class Model:
        def predict(self, x):
            entered.set()
            leave.wait()
            return x
    """
    module = opened(tmp_path, text, batch_s=0.05).factory().to("cpu")
    (code,) = [code for name, code in sys.modules.items() if is_private(name) and hasattr(code, "entered")]
    thread = threading.Thread(target=module, args=(torch.from_numpy(rows(1)),))
    thread.start()
    try:
        assert code.entered.wait(60)
        with pytest.raises(ProcessAway, match="hangs, in all of its replicas"):
            module(torch.from_numpy(rows(1)))
    finally:
        code.leave.set()
        thread.join()
    assert module(torch.from_numpy(rows(1)))[0].tolist() == [[1, 1]]


# --- what is refused when it is loaded ------------------------------------------------------------------------


def has(method: str) -> str:
    """A class with that method, beside a `predict` that will do."""
    return f"class Model:\n    def predict(self, x):\n        return x\n    {method}\n"


REFUSED = {
    "def predict(x):\n    return x": "there is no class Model in it",
    "Model = 3": "Model is no class",
    "class Model:\n    pass": "Model.predict is not there",
    "class Model:\n    predict = 3": "Model.predict is not there",
    has("def predict(self, z): ..."): "Model.predict(z) does not take the inputs of model.toml, ['x']",
    has("def predict(self, x, z): ..."): "missing a required argument: 'z'",
    has("def predict(): ..."): "Model.predict does not take the inputs of model.toml",
    has("async def predict(self, x): ..."): "Model.predict is async",
    has("def predict(self, x): yield x"): "Model.predict yields",
    has("def load(self): ..."): "Model.load() takes one argument, the context",
    has("def __init__(self, path): ..."): "Model() raised TypeError",
    has("framework = 'jax'"): "Model.framework is 'jax'",
    "class Model\n    pass": "importing it raised SyntaxError: ",
    "import no_such_library": "importing it raised ModuleNotFoundError: No module named 'no_such_library'",
    "raise SystemExit(3)": "importing it raised SystemExit: 3",
    "import torch\ntorch.nn.functional.relu = print\n" + has(""): "importing it replaced torch.nn.functional.relu",
}


def test_a_module_beside_it_is_imported_relatively(tmp_path: Path) -> None:
    place = put(tmp_path, "import helper\n" + DOUBLES)
    (place / "helper.py").touch()
    with pytest.raises(FailedPrecondition, match=r"helper.py lies beside it: from \. import helper"):
        source(tmp_path).open(0)


@pytest.mark.parametrize("text", REFUSED)
def test_a_class_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(FailedPrecondition) as raised:
        opened(tmp_path, text)
    assert raised.value.message.startswith("odd/1/model.py: ")
    assert REFUSED[text] in raised.value.message


def test_what_load_raises_names_the_file(tmp_path: Path) -> None:
    text = """
    class Model:
        def load(self, context):
            open(context.directory / "weights.bin")
        def predict(self, x):
            return x
    """
    module = opened(tmp_path, text).factory()
    with pytest.raises(
        FailedPrecondition, match=r"odd/1/model.py: Model.load\(\) raised FileNotFoundError: .*weights.bin"
    ):
        module.to("cpu")


def test_files_that_change_while_it_loads_are_noticed(tmp_path: Path) -> None:
    text = """
    class Model:
        def load(self, context):
            (context.directory / "weights.bin").write_text("others")
        def predict(self, x):
            return x
    """
    put(tmp_path, text)
    (tmp_path / "odd/1/weights.bin").write_text("weights")
    module = source(tmp_path).open(0).factory()
    with pytest.raises(FailedPrecondition, match=r"odd/1/weights.bin changed while it was loaded"):
        module.to("cpu")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ('dtype = "bfloat16"', "dtype: bad/1/model.py was saved to run in its own datatypes"),
        ('optimize = "inductor"', "optimize: bad/1/model.py has no variant 'inductor'"),
        ("memory_limit_mb = 100", 'memory_limit_mb: it is for isolation = "process"'),
        ('isolation = "process"\ndevices = ["cpu"]', "devices: isolation"),
        ('isolation = "process"\nimports = ["json"]', "imports: isolation"),
        ('state = "shared"\nreplicas = 2', "replicas: state"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(tmp_path: Path, settings: str, said: str) -> None:
    put(tmp_path, DOUBLES, name="bad", settings=settings)
    assert repository.scan(tmp_path).failures["bad@1"].startswith(f"bad/model.toml: {said}")


def test_processes_are_for_python_alone(tmp_path: Path) -> None:
    put(tmp_path, DOUBLES, settings='isolation = "process"')
    (tmp_path / "odd/1/model.py").rename(tmp_path / "odd/1/model.pt2")
    assert 'isolation: "process" is for model.py' in repository.scan(tmp_path).failures["odd@1"]


def test_a_signature_is_needed(tmp_path: Path) -> None:
    put(tmp_path, DOUBLES, signature="")
    assert "inputs: have to stand here" in repository.scan(tmp_path).failures["odd@1"]


def test_arrays_of_numpy_are_on_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r'odd/model.toml: devices: .*framework = "torch"'):
        opened(tmp_path, DOUBLES, settings='devices = ["cuda"]')


# --- what is refused when it answers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("[1.0, 2.0]", "predict returned a list of 2, its signature has ['y']"),
        ("x.tolist()", "predict returned a list of 2, its signature has ['y']"),
        ('{"y": x.tolist()}', "output 'y' is list, not an array"),
        ('{"z": x}', "did not return the output 'y', only ['z']"),
        ("(x, x)", "predict returned a tuple of 2"),
        ("None", "output 'y' is NoneType, not an array"),
        ("(row for row in x)", "output 'y' is generator, not an array"),
        ('x.astype("float64")', "output 'y' is float64, its signature says FP32: .astype(np.float32) converts it"),
        ('x.astype("U8")', "output 'y' is <U8, its signature says FP32"),
    ],
)
def test_outputs_that_are_none_are_named(tmp_path: Path, returned: str, said: str) -> None:
    with pytest.raises(Internal) as raised:
        ask(tmp_path, f"class Model:\n    def predict(self, x):\n        return {returned}\n")
    assert "odd/1/model.py: predict" in raised.value.message
    assert said in raised.value.message


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("x", "preprocess returned ndarray, not a dict of what predict takes"),
        ('{"x": x[: 1 + int(x[0] > 1)]}', "'x' is [1] for one row and [2] for another"),
        ('{"x": x} if x[0] > 1 else {"x": x, "z": x}', "preprocess made ['x'] of one row, and ['x', 'z'] of another"),
    ],
)
def test_rows_that_do_not_go_together_are_named(tmp_path: Path, returned: str, said: str) -> None:
    text = f"""
    class Model:
        def preprocess(self, x):
            return {returned}
        def predict(self, x):
            return x
    """
    with pytest.raises(TensorNextError) as raised:
        ask(tmp_path, text)
    assert said in raised.value.message
