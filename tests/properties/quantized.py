"""Productions with quantized weights and activations."""

from __future__ import annotations

from tests.properties.registry import production
from tests.properties.writer import Writer

STEP = "Constant<value_float=0.02>()"


def _weight(g: Writer, kind: str, *dims: int) -> str:
    """A quantized weight of this type, or a zero point or scale."""
    name = g.name({"f": "s"}.get(kind, "q"))
    g.quantized.append(f"{name}:{kind}:{','.join(map(str, dims))}")
    return name


@production
def rounded(g: Writer) -> None:
    """An activation in steps, between other operators."""
    x = g.pick()
    if x is None:
        return
    step, zero = g.emit(STEP)[0], _weight(g, "u8")
    g.same(x, f"DequantizeLinear(QuantizeLinear({x}, {step}, {zero}), {step}, {zero})")


@production(weight=2)
def dequantized_weight(g: Writer) -> None:
    """A layer whose weight is integers, with one scale or one for each channel."""
    x = g.pick()
    if x is None:
        return
    width = g.width()
    out = 0 if x.kind == "image" else 1
    dims = (width, x.channels, 1, 1) if x.kind == "image" else (x.channels, width)
    per = (width,) if g.opset >= 13 and g.flip() else ()
    axis = f"<axis={out}>" if per else ""
    zero = f", {_weight(g, 'i8', *per)}" if g.flip() else ""
    w = f"DequantizeLinear{axis}({_weight(g, 'i8', *dims)}, {_weight(g, 'f', *per)}{zero})"
    g.put(x.kind, width, f"{'Conv' if x.kind == 'image' else 'MatMul'}({x}, {w})")


@production
def dynamic(g: Writer) -> None:
    """Integers summed with scales that are measured."""
    x = g.pick()
    if x is None:
        return
    width = g.width()
    q, scale, zero = g.emit(f"DynamicQuantizeLinear({x})", 3)
    if x.kind == "image":
        made = f"ConvInteger({q}, {_weight(g, 'i8', width, x.channels, 1, 1)}, {zero})"
    else:
        made = f"MatMulInteger({q}, {_weight(g, 'i8', x.channels, width)}, {zero})"
    g.put(x.kind, width, f"Mul(Cast<to=1>({made}), Mul({scale}, {_weight(g, 'f')}))")


@production
def integers(g: Writer) -> None:
    """QLinearConv and QLinearMatMul between steps."""
    x = g.pick()
    if x is None:
        return
    width = g.width()
    step, zero = g.emit(STEP)[0], _weight(g, "u8")
    q = f"QuantizeLinear({x}, {step}, {zero})"
    if x.kind == "image":
        w = _weight(g, "i8", width, x.channels, 1, 1)
        per = (width,) if g.flip() else ()
    else:
        w, per = _weight(g, "i8", x.channels, width), ()
    operands = f"{q}, {step}, {zero}, {w}, {_weight(g, 'f', *per)}, {_weight(g, 'i8', *per)}"
    op = "QLinearConv" if x.kind == "image" else "QLinearMatMul"
    g.put(x.kind, width, f"DequantizeLinear({op}({operands}, {step}, {zero}), {step}, {zero})")
