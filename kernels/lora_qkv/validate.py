"""What ops with adapters accept."""

from collections.abc import Sequence

from torch import Tensor, float32

from ..dispatch import (
    dtypes_of,
    expect,
    expect_multiples,
    expect_rows,
    expect_slots,
    refuse_in_reference,
    resolve_backend,
)

MOST_RANK = 128


def expect_projections(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    slots: Tensor | None,
    sizes: Sequence[int] | None,
    grads: tuple[Tensor, Tensor] | None,
    backend: str | None,
) -> tuple[str, list[int], Tensor | None]:
    """The backend that runs, the sizes and contiguous slots; raises on projections that the backend does not take."""
    backend = resolve_backend(backend, x)
    expect("x", x, ("B", "S", "D"), dtypes_of(backend))
    expect("weight", weight, ("Nq+Nk+Nv", x.size(2)), (x.dtype,), x.device)
    width, rows = x.size(2), weight.size(0)
    if sizes is None and (rows < 3 or rows % 3):
        raise ValueError(f"sizes is missing, and weight's {rows} rows are not three equal projections")
    if sizes is not None and (len(sizes) != 3 or min(sizes) < 1 or sum(sizes) != rows):
        raise ValueError(f"sizes is {tuple(sizes)}; wanted three positive sizes that add up to weight's {rows} rows")
    sizes = [rows // 3] * 3 if sizes is None else [int(size) for size in sizes]
    given = {"lora_a": lora_a, "lora_b": lora_b}
    slots = expect_adapters(given, ("slots", 3, "R", width), rows, x, slots, grads, backend)
    if backend == "triton":
        expect_multiples(16, D=width, **dict(zip(("Nq", "Nk", "Nv"), sizes, strict=True)))
    return backend, sizes, slots


def expect_product(
    name: str,
    weight: Tensor,
    given: dict[str, Tensor],
    width: int,
    x: Tensor,
    slots: Tensor | None,
    grads: tuple[Tensor, Tensor] | None,
    backend: str,
) -> Tensor | None:
    """The contiguous slots; raises on a weight, [N, `width`], or adapters, `given`, that the backend does not take."""
    expect(name, weight, ("N", width), (x.dtype,), x.device)
    slots = expect_adapters(given, ("slots", "R", width), weight.size(0), x, slots, grads, backend)
    if backend == "triton":
        expect_multiples(16, **{f"N of {name}": weight.size(0), f"K of {name}": width})
    return slots


def expect_adapters(
    given: dict[str, Tensor],
    shape: tuple[int | str, ...],
    rows: int,
    x: Tensor,
    slots: Tensor | None,
    grads: tuple[Tensor, Tensor] | None,
    backend: str,
) -> Tensor | None:
    """The contiguous slots; raises unless `given`, A and B by name, are of this `shape` and [slots, `rows`, R]."""
    (name_a, a), (name_b, b) = given.items()
    expect(name_a, a, shape, (x.dtype, float32) if backend == "triton" else dtypes_of(backend), x.device)
    expect(name_b, b, (a.size(0), rows, a.size(-2)), (a.dtype,), x.device)
    expect_multiples(1, MOST_RANK if backend == "triton" else None, R=a.size(-2))
    slots = expect_slots(slots, x.size(0), x.device, pool=a.size(0))
    if grads is not None:
        for i, (grad, like) in enumerate(zip(grads, (a, b), strict=True)):
            expect_rows(f"grads[{i}]", grad, like, (like.dtype, float32))
        if backend == "reference":
            refuse_in_reference(grads=grads)
    return slots
