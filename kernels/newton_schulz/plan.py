"""The matrix products of many Newton-Schulz iterations at once, as a table of tiles.

A matrix of any shape is stored in panels: columns 0..127 of all its rows, then columns 128..255, each panel contiguous.
All matrices of all shapes lie one after the other in one tensor of 128 columns, the arena, padded with zeros to whole
panels, so the same two descriptors read every operand. Padding needs no mask: zero rows of x stay zero through every
product. Matrices are stored short side first, x [m, n] with m <= n.

standard, an iteration:   R = X X^T;  P = a I + b R + c R R;  X <- P X
gram, on m x m alone:     P = a I + b R + c R R;  Q <- Q P;  R <- P (R P);      X <- Q X and R = X X^T at the start,
                          after every third iteration (else rounding makes R indefinite) and, without R, at the end

Every product but P X is symmetric, since all factors are polynomials in R: its lower triangle is computed, and mirrored
or, in one chained launch, read transposed. Multiplications of an iteration of m x n: standard m*m*(n/2 + m/2 + n);
gram 4 * m^3/2 and little else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..dispatch import round_up
from .reference import coefficients_of

GRAM, SYMMETRIC, APPLY = 0, 1, 2
"""Kinds of product: S <- X X^T, S <- alpha S S + beta S + gamma I, X <- S X."""
FIELDS = 12
"""int32 of a tile, a multiple of 16 bytes; see :meth:`_Grid.tiles`."""
CHAIN_FIELDS = 16
"""int32 of a tile of a chained launch; see :meth:`_Grid.chain`."""
RESTART = 3
"""Iterations between fresh Gram matrices. With products rounded to fp16 and singular values from 0.01 to 1, 256 x 640,
polar_express: error 0.22 of bf16's standard form with 3, 1.15 of it with 2, 3.9 of it (256 x 512) without any."""


@dataclass(frozen=True)
class Product:
    """result <- alpha * left @ right + beta * addend + gamma * I; numbers name copies of S, or of X."""

    kind: int
    left: int
    right: int
    result: int
    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 0.0


def standard_program(steps: int, coefficients: str) -> list[list[Product]]:
    """Products of the standard form, in an order in which each list may run at once."""
    program = []
    for step, (a, b, c) in enumerate(coefficients_of(coefficients, steps)):
        x = step % 2
        program += [[Product(GRAM, x, x, 0)], [Product(SYMMETRIC, 0, 0, 1, c, b, a)], [Product(APPLY, 1, x, 1 - x)]]
    return program


def gram_program(steps: int, coefficients: str) -> list[list[Product]]:
    """Products of the Gram form, in an order in which each list may run at once."""
    r, product, spare, total, other = range(5)  # copies of S: R, P, R P, Q, and the next Q
    program, x = [], 0
    for step, (a, b, c) in enumerate(coefficients_of(coefficients, steps)):
        is_first, goes_on = step % RESTART == 0, step + 1 < steps and (step + 1) % RESTART
        if is_first:
            if step:
                program.append([Product(APPLY, total, x, 1 - x)])
                x = 1 - x
            program.append([Product(GRAM, x, x, r)])
        target = total if is_first else product
        program.append([Product(SYMMETRIC, r, r, target, c, b, a)])
        together = []
        if not is_first:
            together.append(Product(SYMMETRIC, total, product, other))
        if goes_on:
            together.append(Product(SYMMETRIC, r, target, spare))
        if together:
            program.append(together)
        if goes_on:
            program.append([Product(SYMMETRIC, target, spare, r)])
        if not is_first:
            total, other = other, total
    program.append([Product(APPLY, total, x, 1 - x)])
    return program


PROGRAMS = {"standard": (standard_program, 2), "gram": (gram_program, 5)}
"""Name of a form: its program, and the copies of S that it needs."""


@dataclass(frozen=True)
class Shapes:
    """`count` matrices [rows, columns], orthogonalised in form `form`."""

    count: int
    rows: int
    columns: int
    form: str

    @property
    def is_tall(self) -> bool:
        return self.rows > self.columns


@dataclass(frozen=True, eq=False)
class Plan:
    """What :func:`plan_of` lays out."""

    starts: tuple[int, ...]
    """First arena row of each matrix, where its X is."""
    arena_rows: int
    result_rows: int
    result_columns: int
    tiles: Tensor
    """int32 [T, FIELDS] of all launches, or [T, CHAIN_FIELDS] of one."""
    factors: Tensor
    """fp32 [T, 4]: alpha, beta, gamma."""
    launches: tuple[tuple[int, int], ...]
    """First tile and number of tiles of each set that depends on the sets before it only."""


def result_layout(shapes: tuple[Shapes, ...], unit: int) -> tuple[list[int], int, int]:
    """First row of each shape's matrices in the packed result, its rows, and its columns."""
    firsts, rows = [], 0
    for s in shapes:
        firsts.append(rows)
        rows += s.count * round_up(s.rows, unit)
    return firsts, rows, max(round_up(s.columns, unit) for s in shapes)


@lru_cache(maxsize=256)
def plan_of(
    shapes: tuple[Shapes, ...], steps: int, coefficients: str, panel: int, device: torch.device, chained: bool = False
) -> Plan:
    """The plan of `shapes` for tiles and panels of `panel`, for a launch a set or one chained launch."""
    firsts, result_rows, result_columns = result_layout(shapes, panel)
    grids, starts, arena = [], [], 0
    for s, first in zip(shapes, firsts, strict=True):
        m, n = (round_up(side, panel) for side in sorted((s.rows, s.columns)))
        grid = _Grid(m, n, panel, arena, PROGRAMS[s.form][1], first, s.is_tall, len(starts), s.count)
        starts += [grid.base(q) for q in range(s.count)]
        arena = grid.base(s.count)
        grids.append(grid)
    programs = [PROGRAMS[s.form][0](steps, coefficients) for s in shapes]
    slots: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in range(max(map(len, programs)))]
    work = [0.0] * len(slots)
    for index in sorted(range(len(shapes)), key=lambda i: -len(programs[i])):
        grid, done = grids[index], 0
        for slot, products in zip(_lightest(work, len(programs[index])), programs[index], strict=True):
            waits_for = done
            for product in products:
                is_last = slot == len(slots) - 1
                table = grid.chain(product, is_last, waits_for) if chained else grid.tiles(product, is_last)
                scalars = torch.tensor([product.alpha, product.beta, product.gamma, 0.0]).expand(len(table), 4)
                slots[slot].append((grid.depth(product), table, scalars))
                work[slot] += float(grid.depth(product) * grid.count * grid.tiles_of(product))
                done += grid.tiles_of(product)
    launches, tables, factors, first = [], [], [], 0
    for sets in slots:
        sets.sort(key=lambda one: -one[0])  # the deepest first, so that none ends late
        rows = sum(len(table) for _, table, _ in sets)
        launches.append((first, rows))
        first += rows
        tables += [table for _, table, _ in sets]
        factors += [scalars for _, _, scalars in sets]
    return Plan(
        starts=tuple(starts),
        arena_rows=arena,
        result_rows=result_rows,
        result_columns=result_columns,
        tiles=torch.cat(tables).to(device),
        factors=torch.cat(factors).to(device),
        launches=tuple(launches),
    )


def _lightest(work: list[float], needed: int) -> list[int]:
    """Slots, in order, for a shorter program: the last, and of the others those with the least work so far."""
    others = sorted(range(len(work) - 1), key=lambda i: work[i])[: needed - 1]
    return [*sorted(others), len(work) - 1]


@dataclass(frozen=True)
class _Grid:
    """Where the copies of one shape's matrices lie, and their tiles. Of each: X twice, and `squares` times S."""

    m: int
    n: int
    panel: int
    arena: int
    squares: int
    result: int
    is_tall: bool
    first_matrix: int
    count: int

    def base(self, matrix):
        """First arena row of matrix number `matrix`, an integer or a tensor of them."""
        return self.arena + matrix * ((2 * self.n + self.squares * self.m) * self.m // self.panel)

    def depth(self, product: Product) -> int:
        """Multiplications of an element of `product`."""
        return self.n if product.kind == GRAM else self.m

    def tiles_of(self, product: Product) -> int:
        """Tiles of `product` for one matrix."""
        rows, columns = self.m // self.panel, self.n // self.panel
        return rows * columns if product.kind == APPLY else rows * (rows + 1) // 2

    def tiles(self, product: Product, is_last: bool) -> Tensor:
        """int32 [tiles, FIELDS], in bands of eight tile rows, which keep their operands in L2.

        0 left, 1 rows to the next panel of both operands, 2 right, 3 depth, 4 addend or -1, 5 result, 6 mirrored
        result, 7 row and 8 column of the tile, 9 kind (0 apply, 1 symmetric, 2 last and as it is, 3 last and
        transposed); rows are rows of the arena.
        """
        panel, m = self.panel, self.m
        matrix, i, j = self._places(product)
        across = j // panel * m + i
        left, right, to = self._operands(product, matrix)
        is_apply = product.kind == APPLY
        kind = (3 if self.is_tall else 2) if is_last else int(not is_apply)
        addend = right + across if product.beta else -1
        target, mirror = to + across, to + i // panel * m + j
        if is_last:
            target = self._last(matrix, i, j)
        right = right + (j // panel * m if is_apply else j)
        return _table((left + i, m, right, self.depth(product), addend, target, mirror, i, j, kind), i, FIELDS)

    def chain(self, product: Product, is_last: bool, waits_for: int) -> Tensor:
        """int32 [tiles, CHAIN_FIELDS], in the order of :meth:`tiles`.

        An S is stored on and under its diagonal alone; what is above is read transposed. So operands are read in up
        to three ranges of depth: as rows and rows transposed, as rows and columns, as columns transposed and columns.

        0 left as rows, 1 rows to the next panel of both operands, 2 right as rows, 3 left and 4 right as columns,
        5 depth, 6 and 7 ends of the first two ranges, 8 addend or -1, 9 row and 10 column of the result, 11 kind (0 as
        it is, 1 to be made symmetric, 2 last and as it is, 3 last and transposed), 12 matrix, 13 tiles of that matrix
        to be done before, 14 whether it is on the diagonal of an S; rows are rows of the arena.
        """
        panel, m = self.panel, self.m
        matrix, i, j = self._places(product)
        across = j // panel * m + i
        left, right, to = self._operands(product, matrix)
        depth, is_apply = self.depth(product), product.kind == APPLY
        first, second = (0 if is_apply else j), i + panel
        if product.kind == GRAM:
            first = second = depth
        is_diagonal = (i == j).long() * int(not is_apply)
        place = (to + across, 0, is_diagonal * int(product.left != product.right))
        if is_last:
            place = (self._last(matrix, i, j), i if self.is_tall else j, 3 if self.is_tall else 2)
        operands = (left + i, m, right + j, left + i // panel * m, right + j // panel * m)
        addend = right + across if product.beta else -1
        order = (self.first_matrix + matrix, waits_for, is_diagonal)
        return _table((*operands, depth, first, second, addend, *place, *order), i, CHAIN_FIELDS)

    def _places(self, product: Product) -> tuple[Tensor, Tensor, Tensor]:
        """Matrix, row and column of each tile of a result."""
        across = self.n if product.kind == APPLY else self.m
        i, j = torch.meshgrid(torch.arange(0, self.m, self.panel), torch.arange(0, across, self.panel), indexing="ij")
        i, j = i.reshape(-1), j.reshape(-1)
        if product.kind != APPLY:
            i, j = i[j <= i], j[j <= i]
        order = torch.argsort((i // (8 * self.panel)) * (1 << 40) + j * (1 << 20) + i)
        matrix = torch.arange(self.count).repeat_interleave(len(order))
        return matrix, i[order].repeat(self.count), j[order].repeat(self.count)

    def _operands(self, product: Product, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First rows of the left and the right operand and of the result."""

        def x(copy: int) -> Tensor:
            return self.base(matrix) + copy * (self.m * self.n // self.panel)

        def square(copy: int) -> Tensor:
            return x(2) + copy * (self.m * self.m // self.panel)

        left = (x if product.kind == GRAM else square)(product.left)
        right = (square if product.kind == SYMMETRIC else x)(product.right)
        return left, right, (x if product.kind == APPLY else square)(product.result)

    def _last(self, matrix: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Row of the packed result where tile (i, j) of a matrix goes."""
        return self.result + matrix * (self.n if self.is_tall else self.m) + (j if self.is_tall else i)


def _table(fields: Sequence[Tensor | int], like: Tensor, width: int) -> Tensor:
    """int32 [len(like), width] of these columns, then zeros."""
    fields = [*fields, *[0] * (width - len(fields))]
    columns = [f if isinstance(f, Tensor) else torch.full_like(like, f) for f in fields]
    return torch.stack(columns, dim=1).to(torch.int32)
