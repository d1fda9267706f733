"""Draws idea.svg: a chunk is scored, then the adapter learns from it. Run: python docs/idea.py"""

from pathlib import Path

STYLE = """
    .card { fill: #ffffff; stroke: #d0d7de }  .box { stroke-width: 1.5 }
    text { fill: #1f2328; font-family: sans-serif }
    .chunk { fill: #f6f8fa; stroke: #8c959f }  .score { fill: #ddf4ff; stroke: #0969da }
    .learn { fill: #fff1e5; stroke: #bc4c00 }  .arrow { stroke: #57606a; stroke-width: 2; fill: none }
    .head { fill: #57606a }  .name { font-size: 17px; font-weight: bold }  .small { font-size: 15px }
    @media (prefers-color-scheme: dark) {
      .card { fill: #161b22; stroke: #30363d }  text { fill: #e6edf3 }  .chunk { fill: #21262d; stroke: #8b949e }
      .score { fill: #0c2d6b; stroke: #58a6ff }  .learn { fill: #5a1e02; stroke: #f0883e }
      .arrow { stroke: #9da7b3 }  .head { fill: #9da7b3 }
    }
"""
COLUMNS = ("chunk 1", "chunk 2", "chunk 3", "last chunk")
RULE = (
    "A chunk is scored before any weight has seen it. "
    "The model itself stays as it is; each document has its own adapter."
)
WIDTH, HEIGHT, LEFT, STEP, BOX = 860, 312, 116, 186, 154
LABELS = {"document": 52, "score": 138, "learn": 236}
ROWS = {"chunk": (24, 44), "score": (102, 60), "learn": (200, 60)}


def text(x: float, y: float, words: str, kind: str, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def box(kind: str, column: int, *lines: str) -> str:
    x, (y, height) = LEFT + STEP * column, ROWS[kind]
    first = y + height / 2 + (6 if len(lines) == 1 else -5)
    words = (text(x + BOX / 2, first + 21 * n, line, "small" if n else "name") for n, line in enumerate(lines))
    rect = f'<rect x="{x}" y="{y}" width="{BOX}" height="{height}" rx="6" class="box {kind}"/>'
    return rect + "".join(words)


def arrow(*points: tuple[float, float]) -> str:
    path = " L ".join(f"{x} {y}" for x, y in points)
    return f'<path d="M {path}" class="arrow" marker-end="url(#head)"/>'


def draw() -> str:
    parts = [text(18, y, name, "name", "start") for name, y in LABELS.items()]
    for column, name in enumerate(COLUMNS):
        middle, last = LEFT + STEP * column + BOX / 2, column == len(COLUMNS) - 1
        before = "with no adapter yet" if not column else "with this adapter"
        parts += [box("chunk", column, name), box("score", column, "its bits", before)]
        parts.append(arrow((middle, 68), (middle, 97)))
        if not last:
            parts += [box("learn", column, "one Adam step", f"on {name}"), arrow((middle, 162), (middle, 195))]
            edge = LEFT + STEP * column + BOX
            parts.append(arrow((edge, 230), (edge + 16, 230), (edge + 16, 132), (edge + 27, 132)))
    end = LEFT + STEP * (len(COLUMNS) - 1) + BOX / 2
    parts += [text(end, 226, "every chunk scored,", "small"), text(end, 247, "the adapter is dropped", "small")]
    parts.append(text(WIDTH / 2, 292, RULE, "small"))
    marker = 'id="head" markerWidth="9" markerHeight="8" refX="6" refY="4" orient="auto" markerUnits="userSpaceOnUse"'
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            "<title>A chunk is scored, then the adapter learns from it</title>",
            f"<style>{STYLE}</style>",
            f'<defs><marker {marker}><path d="M 0 0 L 9 4 L 0 8 z" class="head"/></marker></defs>',
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8" class="card"/>',
            *parts,
            "</svg>\n",
        )
    )


if __name__ == "__main__":
    Path(__file__).with_name("idea.svg").write_text(draw(), encoding="utf-8")
