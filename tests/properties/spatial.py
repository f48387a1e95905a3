"""Productions over images: convolutions of every kind, pools, moves between channels and space."""

from __future__ import annotations

from tests.properties.registry import production
from tests.properties.writer import SIDE, Writer


@production(weight=2)
def grouped(g: Writer) -> None:
    """Grouped and depthwise convolutions, with and without a multiplier."""
    x = g.pick("image")
    if x is None:
        return
    c = x.channels
    groups = g.choose([n for n in (2, c) if c % n == 0])
    width = c * g.choose((1, 2)) if c <= 8 else c
    w = g.weight(width, c // groups, 1, 1)
    bias = f", {g.weight(width)}" if g.flip() else ""
    g.put("image", width, f"Conv<group={groups}>({x}, {w}{bias})")


@production
def transposed(g: Writer) -> None:
    """Transposed convolutions."""
    x = g.pick("image")
    if x is None:
        return
    groups = g.choose([n for n in (1, 2, x.channels) if x.channels % n == 0])
    per = g.choose((1, 2, 3)) if groups * 3 <= 24 else 1
    width = groups * per
    w = g.weight(x.channels, per, 1, 1)
    bias = f", {g.weight(width)}" if g.flip() else ""
    g.put("image", width, f"ConvTranspose<group={groups}>({x}, {w}{bias})")


@production
def deformable(g: Writer) -> None:
    """Deformable convolutions, their offsets made by a layer."""
    x = g.pick("image")
    if x is None or g.opset < 19:
        return
    parts = g.choose([n for n in (1, 2) if x.channels % n == 0])
    groups = g.choose([n for n in (1, 2) if x.channels % n == 0])
    width = 2 * g.choose((1, 2, 3))
    offsets = f"Tanh(Conv({x}, {g.weight(2 * parts, x.channels, 1, 1)}))"
    w, b = g.weight(width, x.channels // groups, 1, 1), g.weight(width)
    attributes = f"<group={groups}, offset_group={parts}>"
    g.put("image", width, f"DeformConv{attributes}({x}, {w}, {offsets}, {b})")


@production
def computed_weight(g: Writer) -> None:
    """A convolution whose weight is scaled by what the model sees."""
    x = g.pick("image")
    if x is None:
        return
    seen = g.reduce("ReduceMean", f"Tanh({x})", (0, 2, 3))
    seen = f"Sigmoid({g.reduce('ReduceSum', seen, (1,))})"
    g.put("image", 6, f"Conv({x}, Mul({g.weight(6, x.channels, 1, 1)}, {seen}))")


@production(weight=2)
def pool(g: Writer) -> None:
    """Pools that keep the size."""
    x = g.pick("image")
    if x is None:
        return
    op = g.choose(("MaxPool", "AveragePool", "LpPool"))
    g.same(x, f"{op}<kernel_shape=[3,3], pads=[1,1,1,1]>({x})")


@production
def unpool(g: Writer) -> None:
    """Maxima to where they were."""
    x = g.pick("image")
    if x is None:
        return
    window = "<kernel_shape=[2,2], strides=[2,2]>"
    top, where = g.emit(f"MaxPool{window}({x})", 2)
    shape = f", Shape({x})" if g.flip() else ""
    g.same(x, f"MaxUnpool{window}({top}, {where}{shape})")


@production
def down_and_up(g: Writer) -> None:
    """Half the size and back, by sizes or scales."""
    x = g.pick("image")
    if x is None or g.opset < 13:
        return
    small = f"MaxPool<kernel_shape=[2,2], strides=[2,2]>({x})"
    if g.flip():
        space = f"Slice(Shape({x}), {g.numbers(2)}, {g.numbers(4)})"
        whole = f"Slice(Shape({small}), {g.numbers(0)}, {g.numbers(2)})"
        g.same(x, f"Resize({small}, , , Concat<axis=0>({whole}, {space}))")
    else:
        scales = "Constant<value_floats=[1.0, 1.0, 2.0, 2.0]>()"
        g.same(x, f"Resize({small}, , {scales})")


@production
def depth_and_space(g: Writer) -> None:
    """Channels to space or back; a pool or resize restores the size."""
    x = g.pick("image")
    if x is None:
        return
    if x.channels % 4 == 0 and x.channels > 4 and g.flip():
        mode = g.choose(("DCR", "CRD"))
        wide = f'DepthToSpace<blocksize=2, mode="{mode}">({x})'
        pooled = f"AveragePool<kernel_shape=[2,2], strides=[2,2]>({wide})"
        g.put("image", x.channels // 4, pooled)
    elif x.channels <= 6 and g.opset >= 13:
        deep = f"SpaceToDepth<blocksize=2>({x})"
        scales = "Constant<value_floats=[1.0, 1.0, 2.0, 2.0]>()"
        g.put("image", x.channels * 4, f"Resize({deep}, , {scales})")


@production
def columns(g: Writer) -> None:
    """Col2Im of tiles."""
    x = g.pick("image")
    if x is None or g.opset < 18 or x.channels % 4 or x.channels == 4:
        return
    tiles = f"AveragePool<kernel_shape=[2,2], strides=[2,2]>({x})"
    flat = f"Reshape({tiles}, {g.numbers(0, x.channels, SIDE)})"
    image, block = g.numbers(SIDE, SIDE), g.numbers(2, 2)
    g.put("image", x.channels // 4, f"Col2Im<strides=[2,2]>({flat}, {image}, {block})")


@production
def sampled(g: Writer) -> None:
    """Bilinear samples at learned places."""
    x = g.pick("image")
    if x is None or g.opset < 16:
        return
    places = f"Conv({x}, {g.weight(2, x.channels, 1, 1)})"
    grid = f"Transpose<perm=[0,2,3,1]>(Tanh({places}))"
    g.same(x, f"GridSample({x}, {grid})")


@production
def windows(g: Writer) -> None:
    """Window partition, a layer over each window's tokens, and back."""
    x = g.pick("image")
    if x is None:
        return
    c, width = x.channels, g.width()
    half = SIDE // 2
    apart = f"Reshape({x}, {g.numbers(-1, c, half, 2, half, 2)})"
    tokens = f"Transpose<perm=[0,2,4,3,5,1]>({apart})"
    rows = f"Reshape({tokens}, {g.numbers(-1, 4, c)})"
    made = f"MatMul({rows}, {g.weight(c, width)})"
    back = f"Reshape({made}, {g.numbers(-1, half, half, 2, 2, width)})"
    whole = f"Transpose<perm=[0,5,1,3,2,4]>({back})"
    g.put("image", width, f"Reshape({whole}, {g.numbers(-1, width, SIDE, SIDE)})")
