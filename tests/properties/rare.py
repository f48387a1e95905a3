"""Productions with operators that few models have."""

from __future__ import annotations

from tests.properties.registry import production
from tests.properties.writer import SIDE, Writer


@production(weight=2)
def random_numbers(g: Writer) -> None:
    """Noise, as large as a value or as one number."""
    x = g.pick()
    if x is None or g.opset >= 22:
        return
    options = ["RandomNormalLike({x})", "RandomUniformLike({x})", "RandomNormal<shape=[1]>()"]
    options += ["RandomUniform<shape=[1]>()"]
    options += ["Bernoulli(Sigmoid({x}))"] if g.opset >= 15 else []
    if x.kind == "flat":
        options.append("Cast<to=1>(Multinomial({x}))")
    g.same(x, f"Add({x}, {g.choose(options).format(x=x)})")


@production(weight=2)
def counted(g: Writer) -> None:
    """Numbers that come from lengths: positions, sizes, identity matrices, one-hot rows."""
    x = g.pick("flat", "tokens", "patches")
    if x is None:
        return
    kind = g.choose(("Range", "Size", "EyeLike", "OneHot", "Unique"))
    if kind == "Range":
        axis = g.choose((1, 2)) if x.rank == 3 else 1
        length = f"Squeeze(Gather(Shape({x}), {g.numbers(axis)}))"
        steps = f"Cast<to=1>(Range({g.scalar(0)}, {length}, {g.scalar(1)}))"
        steps = f"Unsqueeze({steps}, {g.numbers(1)})" if axis == 1 and x.rank == 3 else steps
        g.same(x, f"Add({x}, {steps})")
    elif kind == "Size":
        g.same(x, f"Div({x}, Cast<to=1>(Size({x})))")
    elif kind == "Unique":
        values = g.emit(f"Unique(Reshape({x}, {g.numbers(-1)}))", 1)[0]
        g.same(x, f"Add({x}, ReduceMax<keepdims=0>({values}))")
    elif x.kind == "flat" and kind == "EyeLike":
        g.same(x, f"Add({x}, EyeLike({x}))")
    elif x.kind == "flat":
        index = f"ArgMax<axis=1, keepdims=0>({x})"
        values = "Constant<value_floats=[0.0, 1.0]>()"
        g.put("flat", 6, f"OneHot({index}, {g.scalar(6)}, {values})")


@production(weight=2)
def sequence(g: Writer) -> None:
    """Sequences of tensors."""
    x = g.pick()
    if x is None:
        return
    kind = g.choose(("split", "at", "built"))
    join = f"ConcatFromSequence<axis={x.axis}>"
    if kind == "split":
        g.same(x, f"{join}(SplitToSequence<axis={x.axis}>({x}))")
    elif kind == "at":
        made = f"SequenceConstruct({x}, Tanh({x}))"
        length = f"SequenceLength({made})"
        g.same(x, f"SequenceAt({made}, Sub({length}, {g.scalar(1)}))")
    else:
        one = f"SequenceInsert(SequenceEmpty<dtype=1>(), {x})"
        two = f"SequenceErase(SequenceInsert({one}, Tanh({x})), {g.scalar(0)})"
        g.same(x, f"{join}({two})")


@production
def regions(g: Writer) -> None:
    """Regions of images, pooled; their largest values are added everywhere."""
    x = g.pick("image")
    if x is None or g.opset >= 22:
        return
    if g.opset >= 16 and g.flip():
        boxes = f"Reshape(Constant<value_floats=[0.0, 0.0, 2.0, 3.0]>(), {g.numbers(1, 4)})"
        call = f"RoiAlign<output_height=2, output_width=2>({x}, {boxes}, {g.numbers(0)})"
    else:
        boxes = f"Reshape(Constant<value_floats=[0.0, 0.0, 0.0, 2.0, 3.0]>(), {g.numbers(1, 5)})"
        call = f"MaxRoiPool<pooled_shape=[2,2]>({x}, {boxes})"
    g.same(x, f"Add({x}, {g.reduce('ReduceMax', call, (0, 2, 3))})")


@production
def affine(g: Writer) -> None:
    """Images moved as a row of numbers says."""
    x, y = g.pick("image"), g.pick("flat")
    if x is None or y is None or g.opset < 20:
        return
    theta = f"Reshape(MatMul(Tanh({y}), {g.weight(y.channels, 6)}), {g.numbers(-1, 2, 3)})"
    shape = f"Shape({x})"
    if g.flip():
        batch = f"Slice({shape}, {g.numbers(0)}, {g.numbers(1)})"
        shape = f"Concat<axis=0>({batch}, {g.numbers(1, SIDE, SIDE)})"
    g.same(x, f"GridSample({x}, AffineGrid({theta}, {shape}))")


@production
def signals(g: Writer) -> None:
    """Windows, mel filters, short-time transforms: each as one number for every row."""
    x = g.pick("flat")
    if x is None or g.opset < 17 or x.channels < 4:
        return
    kind = g.choose(("HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix", "STFT"))
    if kind == "STFT":
        wave = f"Unsqueeze({x}, {g.numbers(2)})"
        made = f"STFT({wave}, {g.scalar(1)}, , {g.scalar(2)})"
        g.same(x, f"Add({x}, ReduceMax<keepdims=0>({made}))")
    elif kind == "MelWeightMatrix":
        low, high = (f"Constant<value_float={n}.0>()" for n in (1, 100))
        sizes = ", ".join(str(g.scalar(n)) for n in (4, 16, 400))
        g.same(x, f"Add({x}, ReduceMax<keepdims=0>({kind}({sizes}, {low}, {high})))")
    else:
        g.same(x, f"Mul({x}, {kind}({g.scalar(x.channels)}))")


@production
def rotary(g: Writer) -> None:
    """Rotary position embeddings of tokens."""
    x = g.pick("tokens", "patches")
    if x is None or g.opset < 23:
        return
    heads, size = 2, 4
    made = f"MatMul({x}, {g.weight(x.channels, heads * size)})"
    zeros = f"Cast<to=7>(Mul({g.reduce('ReduceMax', f'Tanh({x})', (2,), keep=False)}, {_tiny(g)}))"
    length = f"Squeeze(Gather(Shape({x}), {g.numbers(1)}))"
    places = f"Add({zeros}, Range({g.scalar(0)}, {length}, {g.scalar(1)}))"
    cos, sin = g.weight(32, size // 2), g.weight(32, size // 2)
    g.put(
        x.kind, heads * size, f"RotaryEmbedding<num_heads={heads}>({made}, {cos}, {sin}, {places})"
    )


def _tiny(g: Writer) -> str:
    return g.emit("Constant<value_float=0.001>()")[0]


@production
def cached(g: Writer) -> None:
    """New tokens written into a cache."""
    x = g.pick("tokens", "patches")
    if x is None or g.opset < 24:
        return
    new = f"Tanh(Slice({x}, {g.numbers(0)}, {g.numbers(2)}, {g.numbers(1)}))"
    g.same(x, f"TensorScatter<axis=1>({x}, {new})")


@production
def losses(g: Writer) -> None:
    """A loss against the largest score, added to every score."""
    x = g.pick("flat")
    if x is None:
        return
    target = f"ArgMin<axis=1, keepdims=0>({x})"
    loss = f"SoftmaxCrossEntropyLoss({x}, {target})"
    if g.flip():
        loss = f"NegativeLogLikelihoodLoss(LogSoftmax<axis=1>({x}), {target})"
    g.same(x, f"Add({x}, {loss})")
