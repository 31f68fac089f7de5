"""The cases, in five tables."""

from __future__ import annotations

import torch

from zoo.case import (
    BATCHED,
    CAUGHT,
    CORE,
    EVERY,
    FACTORY,
    ONNX,
    PT2,
    REFUSED,
    SCRIPT,
    TORCH,
    UNBATCHED,
    Case,
    Input,
    boxes,
    cast,
    distribution,
    indices,
    lengths,
    mask,
    normal,
    numbers,
    offsets,
    positive,
    positive_definite,
    spiky,
    truth,
    wild,
    with_end,
)
from zoo.networks import plain, rows, scratch, state, structures, values

SERVED = (BATCHED, UNBATCHED)
"""Either will do, as long as the answers are right."""


# --- an answer depends on earlier requests -------------------------------------------------------------------


def remembers(name: str, network: type[torch.nn.Module], naming: str, **more: object) -> Case:
    """Refused with the name of what it remembers in, unless it may."""
    return Case(
        name, network, may=(REFUSED,), remembers=True, naming=naming, **{"formats": (FACTORY,), "over": 0, **more}
    )  # type: ignore[arg-type]


STATE = [
    remembers("buffer-copy", state.BufferCopy, "last", formats=TORCH, quick=(PT2,), shared=True, chained=True),
    remembers("buffer-add", state.BufferAdd, "total", formats=TORCH, quick=(SCRIPT,), shared=True),
    remembers("buffer-slice", state.BufferSlice, "table", formats=TORCH, quick=(PT2,)),
    remembers("buffer-index-put", state.BufferIndexPut, "memory", formats=TORCH, quick=(PT2,)),
    remembers("buffer-scatter", state.BufferScatter, "counts", formats=TORCH),
    remembers("buffer-out", state.BufferOut, "sums", formats=(SCRIPT, FACTORY)),
    remembers("buffer-set", state.BufferSet, "last"),
    remembers("buffer-assigned", state.BufferAssigned, "average", formats=(PT2, CORE, FACTORY), quick=(PT2,)),
    # To trace it is to leave the assignment out.
    Case(
        "buffer-assigned-traced",
        state.BufferAssigned,
        may=(UNBATCHED,),
        formats=(SCRIPT,),
        remembers=True,
    ),
    remembers("buffer-non-persistent", state.BufferNonPersistent, "recent", formats=TORCH),
    remembers("buffer-view", state.BufferView, "pair|front"),
    remembers("buffer-observer", state.BufferObserver, "low|high", formats=TORCH),
    remembers("buffer-numpy", state.BufferNumpy, "last", quick=(FACTORY,)),
    remembers("parameter-data", state.ParameterData, "bias"),
    remembers("parameter-no-grad", state.ParameterNoGrad, "bias"),
    remembers("attribute-tensor", state.AttributeTensor, "previous", quick=(FACTORY,), shared=True),
    remembers("attribute-number", state.AttributeNumber, "peak"),
    remembers("attribute-list", state.AttributeList, "seen", quick=(FACTORY,), shared=True),
    remembers("attribute-dict", state.AttributeDict, "memory"),
    remembers("attribute-deque", state.AttributeDeque, "window"),
    remembers("attribute-iterator", state.AttributeIterator, "steps|before|earlier"),
    remembers("attribute-object", state.AttributeObject, "tracker"),
    remembers("attribute-slots", state.AttributeSlots, "slotted|before|earlier"),
    remembers("submodule", state.Submodule, r"layers\.1\.1\.last|last", formats=TORCH),
    remembers("module-global", state.ModuleGlobal, "(?i)MEMORY|before|earlier", quick=(FACTORY,)),
    remembers("module-global-number", state.ModuleGlobalNumber, "_step|before|earlier"),
    remembers("closure", state.Closure, "remember|last|before|earlier"),
    remembers("lru-cache", state.LruCache, "statistics|before|earlier", quick=(FACTORY,)),
    remembers("class-attribute", state.ClassAttribute, "last|before|earlier"),
    remembers("thread-local", state.ThreadLocal, "_local|last|before|earlier"),
    remembers("default-argument", state.DefaultArgument, "memory|before|earlier"),
    remembers("environment", state.Environment, "ZOO_LAST|before|earlier"),
    remembers("every-tenth", state.EveryTenth, "calls", quick=(FACTORY,)),
    remembers("recurrent", state.Recurrent, "hidden", shared=True),
    remembers("key-value-cache", state.KeyValueCache, "cache|filled", shared=True),
    remembers("running-statistics", state.RunningStatistics, "running_mean", formats=TORCH),
    # What is drawn next is nobody's answer.
    Case(
        "stored-generator",
        state.StoredGenerator,
        may=(UNBATCHED,),
        formats=(FACTORY,),
        noise=10.0,
        noted="random",
        alike=True,
    ),
    # A batch norm in training mode looks at no statistics, but at the whole batch, and a careful reader may refuse it.
    Case(
        "training-statistics",
        state.TrainingStatistics,
        may=(REFUSED, UNBATCHED),
        formats=(PT2, SCRIPT, FACTORY),
        quick=(PT2,),
        naming="running_mean|num_batches|norm",
        remembers=True,
    ),
    # No load can see these, unless it reads the graph.
    Case(
        "sometimes",
        state.Sometimes,
        (Input("x", ("rows", 8), spiky),),
        may=(REFUSED, CAUGHT),
        formats=(SCRIPT, FACTORY),
        naming="offset",
        remembers=True,
        scripted=True,
        cured=False,
        over=0,
    ),
    Case(
        "sometimes-attribute",
        state.SometimesAttribute,
        (Input("x", ("rows", 8), spiky),),
        may=(REFUSED, CAUGHT),
        formats=(FACTORY,),
        naming="offset",
        remembers=True,
        cured=False,
        over=0,
    ),
    Case(
        "where-writes",
        state.WhereWrites,
        (Input("x", ("rows", 8), spiky),),
        may=(REFUSED, CAUGHT),
        formats=TORCH,
        naming="offset",
        remembers=True,
        cured=False,
        over=0,
    ),
]


# --- it writes before it reads, or fills a cache -------------------------------------------------------------

SIXTY_FOUR = (Input("x", ("rows", 64)),)
SEQUENCES = (Input("x", ("rows", "length", 64)),)
LENGTHS = {"length": (3, 9, 5)}

SCRATCH = [
    Case(
        "large-output",
        scratch.LargeOutput,
        (Input("x", (1, 1)),),
        may=(UNBATCHED,),
        formats=TORCH,
        quick=(FACTORY,),
        rows=(1, 1),
        over=0,
        heavy=True,
    ),
    Case("small-output", scratch.SmallOutput, SIXTY_FOUR, may=SERVED, formats=TORCH, quick=(FACTORY,), auto=True),
    Case("out-keyword", scratch.OutKeyword, SIXTY_FOUR, may=SERVED, formats=(FACTORY,), quick=(FACTORY,)),
    Case("output-list", scratch.OutputList, SIXTY_FOUR, may=SERVED, formats=(FACTORY,)),
    Case("scratch-attribute", scratch.Attribute, SIXTY_FOUR, may=SERVED, formats=(FACTORY,), quick=(FACTORY,)),
    Case("scratch-dict", scratch.AttributeDict, SIXTY_FOUR, may=SERVED, formats=(FACTORY,)),
    Case("scratch-global", scratch.ModuleGlobal, SIXTY_FOUR, may=(*SERVED, REFUSED), formats=(FACTORY,)),
    Case("hooks", scratch.Hooks, SIXTY_FOUR, may=SERVED, formats=(FACTORY,), quick=(FACTORY,)),
    Case("static-input", scratch.Static, SIXTY_FOUR, may=SERVED, formats=TORCH, quick=(SCRIPT,), auto=True),
    Case("reset-state", scratch.ResetState, SIXTY_FOUR, may=SERVED, formats=(FACTORY,)),
    Case("reset-buffer", scratch.ResetBuffer, SIXTY_FOUR, may=(UNBATCHED,), formats=TORCH, remembers=True),
    Case("inference-flag", scratch.InferenceFlag, SIXTY_FOUR, may=(UNBATCHED,), formats=(FACTORY,)),
    Case(
        "rotary-grows", scratch.RotaryGrows, SEQUENCES, may=SERVED, formats=(FACTORY,), quick=(FACTORY,), sizes=LENGTHS
    ),
    Case(
        "rotary-exact", scratch.RotaryExact, SEQUENCES, may=SERVED, formats=(FACTORY,), quick=(FACTORY,), sizes=LENGTHS
    ),
    Case("mask-by-length", scratch.MaskByLength, SEQUENCES, may=SERVED, formats=(FACTORY,), sizes=LENGTHS),
    Case("good-lru-cache", scratch.LruCache, SEQUENCES, formats=(FACTORY,), sizes=LENGTHS),
    Case("inspected", scratch.Inspected, SEQUENCES, may=SERVED, formats=(FACTORY,), sizes={"length": (3, 9)}),
    Case("counts", scratch.Counts, SIXTY_FOUR, may=(*SERVED, REFUSED), formats=(PT2, FACTORY), naming="calls|steps"),
    Case("weight-norm", scratch.WeightNorm, SIXTY_FOUR, may=SERVED, formats=(FACTORY,), quick=(FACTORY,)),
    Case("spectral-norm", scratch.SpectralNorm, SIXTY_FOUR, may=SERVED, formats=(FACTORY,)),
    Case("parametrized", scratch.Parametrized, SIXTY_FOUR, formats=TORCH),
    Case("lazy-once", scratch.LazyOnce, SIXTY_FOUR, may=SERVED, formats=(FACTORY,)),
]


# --- axis 0 is no batch --------------------------------------------------------------------------------------


def mixes(name: str, network: type[torch.nn.Module], **more: object) -> Case:
    """Served one request at a time; where model.toml wants batches, refused with figures."""
    defaults: dict[str, object] = {"formats": EVERY, "asked": True, "rows": (3, 5, 8), "over": 200}
    return Case(name, network, may=(UNBATCHED,), **{**defaults, **more})  # type: ignore[arg-type]


POINTS = (Input("points", ("points", 3)),)

ROWS = [
    mixes("point-cloud", rows.PointCloud, inputs=POINTS, quick=(PT2,), over=500),
    mixes(
        "graph",
        rows.Graph,
        evident=True,
        inputs=(Input("x", ("nodes", 8)), Input("edges", ("edges", 2), indices("nodes"))),
        sizes={"edges": (4, 6)},
        quick=(FACTORY,),
        asked=False,
    ),
    mixes(
        "graph-edges",
        rows.GraphEdges,
        inputs=(Input("x", ("nodes", 8)), Input("edges", (2, "edges"), indices("nodes"))),
        sizes={"edges": (4, 6)},
        asked=False,
    ),
    mixes("set", rows.Set, quick=(FACTORY,)),
    mixes("pairwise", rows.Pairwise, evident=True, asked=False, formats=TORCH),
    mixes(
        "contrastive",
        rows.Contrastive,
        evident=True,
        inputs=(Input("picture", ("rows", 8)), Input("text", ("rows", 8))),
        asked=0,
    ),
    mixes("softmax", rows.Softmax, quick=(PT2,)),
    mixes("sort", rows.Sort, quick=(ONNX,)),
    mixes("cumulative-sum", rows.CumulativeSum),
    mixes("flip", rows.Flip),
    mixes("roll", rows.Roll, formats=(PT2, FACTORY)),
    mixes("normalized", rows.Normalized),
    mixes("largest-norm", rows.LargestNorm, quick=(SCRIPT,)),
    mixes("slight-mean", rows.SlightMean, formats=(PT2, FACTORY), quick=(FACTORY,), noise=1e-5),
    mixes("position", rows.Position, formats=(PT2, FACTORY)),
    mixes("first-row", rows.FirstRow),
    mixes("last-row-only", rows.LastRowOnly, formats=(PT2, FACTORY), quick=(PT2,)),
    mixes("count", rows.Count, formats=(PT2, FACTORY)),
    mixes("rank", rows.Rank, formats=TORCH, quick=(PT2,)),
    mixes(
        "sequence-first",
        rows.SequenceFirst,
        inputs=(Input("x", ("time", 2, 8)),),
        formats=(SCRIPT, FACTORY),
        quick=(FACTORY,),
    ),
    mixes("backwards", rows.Backwards, inputs=(Input("x", ("time", 1, 8)),), formats=(SCRIPT, FACTORY)),
    mixes("attention", rows.Attention, formats=(PT2, FACTORY, ONNX)),
    mixes("signal", rows.Signal, inputs=(Input("signal", ("samples",)),), rows=(16, 20, 35), quick=(FACTORY,)),
    mixes("difference", rows.Difference, formats=(PT2, FACTORY)),
    mixes("covariance", rows.Covariance, formats=(PT2, FACTORY)),
    mixes(
        "nonzero",
        rows.Nonzero,
        evident=True,
        formats=(PT2, SCRIPT, FACTORY),
        quick=(FACTORY,),
        outputs={"output": (-1, 2)},
    ),
    mixes("positive", rows.Positive, evident=True, formats=(PT2, FACTORY), outputs={"output": (-1, 8)}),
    mixes(
        "unique",
        rows.Unique,
        evident=True,
        inputs=(Input("ids", ("ids",), numbers(0, 6)),),
        formats=(PT2, FACTORY),
        outputs={"output": (-1,)},
    ),
    mixes(
        "suppression",
        rows.Suppression,
        inputs=(Input("boxes", ("boxes", 4), boxes), Input("scores", ("boxes",), positive)),
        formats=(FACTORY,),
        outputs={"output": (-1, 4)},
        over=70,
    ),
    mixes(
        "until-all-are-done",
        rows.UntilAllAreDone,
        formats=(SCRIPT, FACTORY),
        scripted=True,
        quick=(FACTORY,),
        outputs={"output": (-1, -1)},
        rows=(1, 2, 3),
        over=70,
    ),
    mixes("until-first-is-done", rows.UntilFirstIsDone, formats=(FACTORY,)),
    mixes(
        "trimmed",
        rows.Trimmed,
        inputs=(Input("ids", ("rows", 12), numbers(0, 2)),),
        formats=(FACTORY,),
        outputs={"output": (-1, -1)},
        rows=(1, 2, 3),
    ),
    # Requests bring four rows for each clip; no example has one row.
    mixes(
        "segments",
        rows.Segments,
        evident=True,
        inputs=(Input("x", ("frames", 8)),),
        formats=(PT2, SCRIPT, FACTORY),
        rows=(8, 12, 16),
        auto=True,
        asked=False,
        quick=(FACTORY,),
    ),
    mixes("pairs", rows.Pairs, rows=(2, 4, 6), asked=False, formats=(SCRIPT, FACTORY)),
    mixes("guidance", rows.Guidance, rows=(2, 4, 6), asked=False, formats=(SCRIPT, FACTORY), quick=(FACTORY,)),
    mixes(
        "ragged",
        rows.Ragged,
        evident=True,
        inputs=(Input("ids", ("ids",), numbers(0, 50)), Input("offsets", ("bags",), offsets)),
        sizes={"ids": (9, 7), "bags": (3, 2)},
        formats=(PT2, FACTORY),
        asked=False,
        quick=(FACTORY,),
    ),
    mixes(
        "boxes-of-picture",
        rows.BoxesOfPicture,
        evident=True,
        inputs=(Input("picture", ("height", "width", 8)), Input("boxes", ("boxes", 8))),
        sizes={"height": (4, 5), "width": (6, 3), "boxes": (2, 3)},
        formats=(PT2, FACTORY),
        asked=False,
    ),
    mixes(
        "queries-and-keys",
        rows.QueryAndKeys,
        evident=True,
        inputs=(Input("queries", ("queries", 8)), Input("keys", ("keys", 8))),
        sizes={"keys": (6, 5)},
        formats=(PT2, FACTORY),
        asked=False,
    ),
    Case(
        "mixes-beyond",
        rows.MixesBeyond,
        (Input("x", ("rows", 8), spiky),),
        may=(UNBATCHED, CAUGHT),
        formats=(FACTORY,),
        over=0,
        toml="audit = 1.0\n",  # else it would be a matter of thousands of batches
    ),
    Case("mixes-from-eleven", rows.MixesFromEleven, may=(UNBATCHED, CAUGHT), formats=(FACTORY,), over=0),
]


# --- not every value will do ---------------------------------------------------------------------------------

WORDS = (Input("x", ("rows", "length", 8)), Input("lengths", ("rows",), lengths("length")))
MATRICES = (Input("matrix", ("rows", 4, 4)),)

VALUES = [
    Case(
        "packed",
        values.Packed,
        WORDS,
        formats=(SCRIPT, FACTORY),
        quick=(FACTORY,),
        sizes={"length": (6, 4)},
        scripted=True,
    ),
    Case("packed-example", values.Packed, WORDS, formats=(FACTORY,), sizes={"length": (6, 4)}, example=True),
    Case("from-one", values.FromOne, (Input("ids", ("rows", 5), numbers(1, 50)),), formats=EVERY, quick=(FACTORY,)),
    Case("entropy", values.Entropy, (Input("probabilities", ("rows", 5), distribution),), formats=(FACTORY,)),
    Case("inverse", values.Inverse, MATRICES, formats=TORCH, quick=(PT2,), noise=1e-2),
    Case(
        "cholesky",
        values.Cholesky,
        (Input("matrix", ("rows", 4, 4), positive_definite),),
        may=SERVED,
        formats=TORCH,
        quick=(FACTORY,),
    ),
    Case(
        "cholesky-example",
        values.Cholesky,
        (Input("matrix", ("rows", 4, 4), positive_definite),),
        formats=TORCH,
        quick=(PT2,),
        example=True,
    ),
    Case("longest", values.Longest, WORDS, formats=(FACTORY,), sizes={"length": (6, 4)}),
    Case(
        "end-token",
        values.EndToken,
        (Input("ids", ("rows", 6), with_end),),
        may=SERVED,
        formats=(FACTORY,),
        quick=(FACTORY,),
    ),
    Case(
        "end-token-example", values.EndToken, (Input("ids", ("rows", 6), with_end),), formats=(FACTORY,), example=True
    ),
    Case("boxes", values.Boxes, (Input("boxes", ("rows", 4), boxes),), may=SERVED, formats=(FACTORY,)),
    Case("finite", values.Finite, formats=(FACTORY,)),
    Case("dates", values.Dates, (Input("months", ("rows",), numbers(1, 13)),), formats=(PT2, FACTORY), alike=True),
    Case(
        "width",
        values.Width,
        (Input("x", ("rows", "columns")),),
        may=SERVED,
        formats=(FACTORY,),
        sizes={"columns": (16, 20)},
    ),
    # The same without a hint of the lengths that it takes.
    Case(
        "width-unsaid",
        values.Width,
        (Input("x", ("rows", 16)),),
        formats=(PT2, FACTORY),
    ),
]


# --- nothing odd ---------------------------------------------------------------------------------------------

PICTURES = (Input("picture", ("rows", 3, 12, 12)),)
IDS = Input("ids", ("rows", "length"), numbers(1, 50))

PLAIN = [
    Case("perceptron", plain.Perceptron, formats=EVERY, quick=(PT2, SCRIPT, FACTORY, ONNX)),
    Case("double", plain.Double, (Input("x", ("rows", 8), cast(normal, torch.float64)),), formats=EVERY),
    Case("bfloat", plain.BFloat, (Input("x", ("rows", 8), cast(normal, torch.bfloat16)),), quick=(FACTORY,)),
    Case("half", plain.Half, (Input("x", ("rows", 8), cast(normal, torch.float16)),), formats=EVERY, quick=(FACTORY,)),
    Case("convolutional", plain.Convolutional, PICTURES, formats=EVERY, quick=(FACTORY,)),
    Case("bytes", plain.Bytes, (Input("picture", ("rows", 6, 6, 3), numbers(0, 256, torch.uint8)),), formats=EVERY),
    Case("channels-last", plain.ChannelsLast, PICTURES, quick=(FACTORY,)),
    Case("norms", plain.Norms, (Input("x", ("rows", 8, 6)),), formats=EVERY),
    Case("bag", plain.Bag, (Input("ids", ("rows", 5), numbers(0, 50)),), quick=(FACTORY,)),
    Case(
        "encoder",
        plain.Encoder,
        (IDS, Input("mask", ("rows", "length"), mask)),
        formats=(PT2, CORE, FACTORY, ONNX),
        quick=(FACTORY,),
        sizes={"length": (7, 4)},
    ),
    Case(
        "lstm",
        plain.Recurrent,
        (Input("x", ("rows", "length", 8)),),
        formats=(SCRIPT, FACTORY),
        quick=(FACTORY,),
        sizes={"length": (7, 4)},
    ),
    Case("argmax", plain.Argmax, formats=EVERY, quick=(FACTORY,)),
    Case(
        "several",
        plain.Several,
        (Input("x", ("rows", 8)), Input("ids", ("rows",), numbers(1, 50)), Input("keep", ("rows",), truth)),
        formats=EVERY,
        quick=(PT2,),
    ),
    Case("mapping", plain.Mapping, quick=(PT2,)),
    Case("named", plain.Named, formats=(FACTORY,)),
    Case("model-output", plain.ModelOutput, formats=(FACTORY,), quick=(FACTORY,)),
    Case(
        "fixed", plain.Fixed, (Input("x", (3, 4)),), may=(UNBATCHED,), formats=EVERY, quick=(PT2,), rows=(1, 1), over=0
    ),
    Case("scalar", plain.Scalar, may=(UNBATCHED,), formats=EVERY, quick=(FACTORY,)),
    Case("per-row", plain.PerRow, formats=EVERY),
    Case(
        "scalar-input",
        plain.ScalarInput,
        (Input("x", ("rows", 8)), Input("temperature", (), positive)),
        may=(UNBATCHED,),
        formats=EVERY,
        quick=(FACTORY,),
    ),
    Case("spectrum", plain.Spectrum, quick=(FACTORY,)),
    Case("imaginary", plain.Imaginary, quick=(FACTORY,)),
    Case(
        "large",
        plain.Large,
        formats=(PT2, FACTORY),
        rows=(1, 2),
        over=0,
        toml="max_batch_size = 2\n",
        heavy=True,
    ),
    Case("identity", plain.Identity, formats=EVERY, quick=(PT2,)),
    Case("hands-both", plain.HandsBoth, formats=TORCH, quick=(FACTORY,)),
    Case("same-twice", plain.SameTwice),
    Case("in-place", plain.InPlace, quick=(FACTORY,)),
    Case("views", plain.Views, (Input("x", ("rows", 4, 6)),), quick=(FACTORY,)),
    Case("constant", plain.Constant, alike=True, quick=(FACTORY,)),
    Case("expanded", plain.Expanded, quick=(FACTORY,)),
    Case("weight-out", plain.WeightOut, (Input("x", (2, 4)),), may=(UNBATCHED,), rows=(1, 1), over=0, quick=(FACTORY,)),
    Case("windows", plain.Windows),
    Case("tied", plain.Tied, (Input("ids", ("rows", 5), numbers(0, 20)),), quick=(FACTORY,)),
    Case(
        "hundred",
        plain.Hundred,
        tuple(Input(f"f{index}", ("rows",)) for index in range(100)),
        formats=(PT2, FACTORY),
        quick=(PT2,),
    ),
    Case("branches", plain.Branches, formats=(FACTORY,), quick=(FACTORY,)),
    Case("sorted-inside", plain.SortedInside, formats=TORCH),
    Case("forces", plain.Forces, formats=(FACTORY,), quick=(FACTORY,)),
    Case("forces-plain", plain.ForcesPlain, formats=(FACTORY,)),
    Case("differentiable", plain.Differentiable, formats=(FACTORY,)),
    Case("lazy", plain.Lazy, formats=(FACTORY,)),
    Case("noise", plain.Noise, may=SERVED, noise=1e-2, quick=(FACTORY,)),
    Case("quantized", plain.Quantized, noise=2e-2),
    Case("sparse", plain.Sparse, formats=(FACTORY,)),
    Case(
        "interpolated",
        plain.NestedJagged,
        (Input("picture", ("rows", 3, "height", "width")),),
        formats=(PT2, FACTORY),
        sizes={"height": (6, 9), "width": (8, 7)},
    ),
    Case("wide", plain.Wide, (Input("x", ("rows", 2048)),), formats=EVERY, quick=(FACTORY,)),
    Case("not-finite", plain.NotFinite, (Input("x", ("rows", 8), wild),), formats=EVERY, quick=(FACTORY,)),
    Case("unsigned", plain.Unsigned, (Input("x", ("rows", 8), numbers(0, 9, torch.uint32)),), formats=(PT2, FACTORY)),
    Case("deep", plain.Deep, formats=(SCRIPT, FACTORY), alike=True),
    Case("empty", plain.Empty, formats=(PT2, FACTORY)),
    Case("own-tensor", plain.OwnTensor, formats=(FACTORY,)),
    Case("parameter-out", plain.ParameterOut, formats=(FACTORY,)),
]


# --- nested, optional, by name -------------------------------------------------------------------------------

X, Y = Input("x", ("rows", 8)), Input("y", ("rows", 8))

STRUCTURES = [
    Case("nested-out", structures.NestedOut, formats=(PT2, CORE, FACTORY), quick=(PT2, FACTORY)),
    Case("nested-mapping", structures.NestedMapping, formats=(PT2, CORE, FACTORY), quick=(FACTORY,)),
    Case("list-out", structures.ListOut, formats=(PT2, FACTORY)),
    Case("with-none", structures.WithNone, formats=(PT2, FACTORY), quick=(PT2,)),
    Case(
        "pair-in",
        structures.PairIn,
        (Input("pair.0", ("rows", 8)), Input("pair.1", ("rows", 8))),
        formats=(PT2, CORE),
        quick=(PT2,),
        nest=lambda first, second: ((first, second),),
    ),
    Case(
        "mapping-in",
        structures.MappingIn,
        (Input("batch.x", ("rows", 8)), Input("batch.y", ("rows", 8))),
        formats=(PT2, CORE),
        quick=(PT2,),
        nest=lambda x, y: ({"x": x, "y": y},),
    ),
    Case(
        "list-in",
        structures.ListIn,
        (Input("features.0", ("rows", 8)), Input("features.1", ("rows", 8)), Input("scale", ("rows",), positive)),
        formats=(PT2, CORE),
        nest=lambda first, second, scale: ([first, second], scale),
    ),
]
