"""Draws docs/figures/architecture.svg, a call's way forward and backward: `python docs/figures/make_architecture.py`.

It needs no package. The drawing has its own light background, so that it is readable on light and dark pages.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 1160, 800
INK, QUIET, LINE = "#1f2933", "#52606d", "#7b8794"
FORWARD, BACKWARD, PLAIN = ("#dcebfa", "#2f6ea5"), ("#fde7d3", "#b3621b"), ("#ffffff", "#9aa5b1")
MONO = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
SANS = "system-ui, 'DejaVu Sans', Helvetica, Arial, sans-serif"

parts: list[str] = []


def text(x: float, y: float, line: str, *, size: float = 12, mono: bool = False, colour: str = INK, bold: bool = False,
         anchor: str = "middle") -> None:  # fmt: skip
    weight = ' font-weight="600"' if bold else ""
    family = MONO if mono else SANS
    parts.append(
        f'<text x="{x}" y="{y}" font-family="{family}" font-size="{size}" fill="{colour}" '
        f'text-anchor="{anchor}"{weight}>{escape(line)}</text>'
    )


def box(x: float, y: float, w: float, h: float, lines: list[str], colours: tuple[str, str] = PLAIN) -> None:
    """The first line names a function, an operator or a kernel; the others say what it does or where it is."""
    fill, edge = colours
    parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" stroke="{edge}"/>')
    top = y + h / 2 - 8 * (len(lines) - 1) + 4
    for index, line in enumerate(lines):
        text(x + w / 2, top + 16 * index, line, size=12 if index == 0 else 11, mono=index == 0,
             colour=INK if index == 0 else QUIET, bold=index == 0)  # fmt: skip


def arrow(*points: tuple[float, float], colours: tuple[str, str]) -> None:
    path = "M" + " L".join(f"{x} {y}" for x, y in points)
    name = "forward" if colours is FORWARD else "backward"
    parts.append(f'<path d="{path}" fill="none" stroke="{colours[1]}" stroke-width="1.8" marker-end="url(#{name})"/>')


def panel(x: float, y: float, w: float, h: float, title: str) -> None:
    parts.append(
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="#eef1f4" stroke="{LINE}" stroke-dasharray="4 3"/>'
    )
    text(x + w / 2, y + h - 12, title, size=13, mono=True, bold=True)


def layer(y: float, words: str) -> None:
    text(20, y, words, size=11, colour=QUIET, anchor="start")


def draw() -> None:
    # The way from the public function to a backend, and the gradients at its end.
    box(
        130,
        54,
        560,
        44,
        ["sinkhorn_loss(x, y, ...)   solve(...)   solve_cost(C, ...)", "functional.py; SinkhornLoss calls it"],
        FORWARD,
    )
    box(730, 54, 400, 44, ["loss.backward()", "gives the gradients in x, y, C, a, b"], BACKWARD)
    box(
        130,
        128,
        560,
        44,
        ["problem.from_points, from_cost", "checks, and Problem(x: Side, y: Side, options: Options, ...)"],
        FORWARD,
    )
    box(
        130,
        202,
        560,
        44,
        ["functional._solve", "backends.resolve chooses a name, backends.solver its function"],
        FORWARD,
    )
    arrow((410, 98), (410, 126), colours=FORWARD)
    arrow((410, 172), (410, 200), colours=FORWARD)

    panel(130, 290, 210, 440, "reference")
    panel(356, 290, 360, 440, "cpu")
    panel(732, 290, 408, 440, "triton, cuda")

    # The bus that spreads a problem over the backends.
    parts.append(
        f'<path d="M410 246 L410 266 M186 266 L834 266" fill="none" stroke="{FORWARD[1]}" stroke-width="1.8"/>'
    )
    for x in (186, 446, 834):
        arrow((x, 266), (x, 318), colours=FORWARD)
    # The bus that spreads the backward pass over them.
    parts.append(
        f'<path d="M930 98 L930 280 M284 280 L1038 280" fill="none" stroke="{BACKWARD[1]}" stroke-width="1.8"/>'
    )
    for x in (284, 626, 1038):
        arrow((x, 280), (x, 318), colours=BACKWARD)

    # reference
    box(
        142,
        320,
        88,
        326,
        ["solve", "plain torch,", "item by item:", "cost matrix,", "log-domain", "iterations,", "plan, value"],
        FORWARD,
    )
    box(
        240,
        320,
        88,
        326,
        [
            "autograd",
            "of torch;",
            "Value: the",
            "envelope",
            "theorem;",
            "Implicit-",
            "Potentials:",
            "implicit",
            "differen-",
            "tiation",
        ],
        BACKWARD,
    )

    # cpu
    box(368, 320, 156, 42, ["cpu.solve", "Problem to operator"], FORWARD)
    box(368, 398, 156, 42, ["otalign::align", "torch.library"], FORWARD)
    box(368, 476, 156, 42, ["_C.cpu_forward", "bindings.cpp: addresses"], FORWARD)
    box(
        368,
        554,
        156,
        92,
        ["cpu/forward.cpp", "products and costs,", "isa.cpp: iterations of", "an item (solver.h),", "plan"],
        FORWARD,
    )
    box(548, 320, 156, 42, ["autograd.py", "keep, restore, spread"], BACKWARD)
    box(548, 398, 156, 42, ["align_backward", "otalign::, torch.library"], BACKWARD)
    box(548, 476, 156, 42, ["_C.cpu_backward", "bindings.cpp: addresses"], BACKWARD)
    box(
        548,
        554,
        156,
        92,
        [
            "cpu/backward.cpp",
            "adjoint.h: adjoint of",
            "an item, panels of the",
            "gradient; products",
            "with the points",
        ],
        BACKWARD,
    )
    for x, colours in ((446, FORWARD), (626, BACKWARD)):
        for y in (362, 440, 518):
            arrow((x, y), (x, y + 34), colours=colours)

    # triton and cuda
    box(744, 320, 180, 42, ["triton.solve", "cuda.solve checks first"], FORWARD)
    box(744, 398, 180, 42, ["otalign::gpu_align", "torch.library"], FORWARD)
    box(744, 476, 180, 42, ["launch.solve", "triton_kernels"], FORWARD)
    box(744, 554, 180, 42, ["cost_kernel", "costs and prior"], FORWARD)
    box(744, 616, 86, 48, ["Triton", "iterations"], FORWARD)
    box(838, 616, 86, 48, ["CUDA", "iterations"], FORWARD)
    box(948, 320, 180, 42, ["autograd.py", "keep, restore, spread"], BACKWARD)
    box(948, 398, 180, 42, ["gpu_align_backward", "otalign::, torch.library"], BACKWARD)
    box(948, 476, 180, 42, ["launch.gradients", "triton_kernels"], BACKWARD)
    box(948, 554, 86, 48, ["Triton", "adjoint"], BACKWARD)
    box(1042, 554, 86, 48, ["CUDA", "adjoint"], BACKWARD)
    box(948, 622, 180, 42, ["gradient kernels", "plan rebuilt tile by tile"], BACKWARD)
    for x, colours in ((834, FORWARD), (1038, BACKWARD)):
        for y in (362, 440):
            arrow((x, y), (x, y + 34), colours=colours)
    arrow((834, 518), (834, 552), colours=FORWARD)
    for x in (787, 881):
        arrow((x, 596), (x, 614), colours=FORWARD)
    for x in (991, 1085):
        arrow((x, 518), (x, 552), colours=BACKWARD)
        arrow((x, 602), (x, 620), colours=BACKWARD)

    # What the forward pass leaves for the backward pass.
    for y, x, w, words in (
        (678, 368, 336, "kept for the backward pass: plan, f, g"),
        (678, 744, 384, "kept for the backward pass: costs, f, g"),
        (678, 142, 186, "kept: the autograd graph"),
    ):
        parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="26" rx="5" fill="#ffffff" stroke="{LINE}"/>')
        text(x + w / 2, y + 17, words, size=11, colour=QUIET)

    box(
        130,
        748,
        1010,
        36,
        [
            "Solution: value, value_linear, f, g, n_iter, error (B,); plan(), barycentric(), assign(), apply()  ->  loss or OTResult"
        ],
        PLAIN,
    )
    for y, words in (
        (80, "public"),
        (154, "validation"),
        (228, "dispatch"),
        (344, "backends/"),
        (422, "operators"),
        (500, "boundary"),
        (600, "kernels"),
        (770, "result"),
    ):
        layer(y, words)
    text(130, 34, "One call, forward", size=14, bold=True, colour=FORWARD[1], anchor="start")
    text(730, 34, "and backward", size=14, bold=True, colour=BACKWARD[1], anchor="start")


def markers() -> str:
    return "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 1 L9 5 L0 9 z" fill="{colours[1]}"/></marker>'
        for name, colours in (("forward", FORWARD), ("backward", BACKWARD))
    )


if __name__ == "__main__":
    draw()
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#f8f9fb"/>'
    drawing = "\n".join([head, f"<defs>{markers()}</defs>", ground, *parts, "</svg>", ""])
    Path(__file__).with_name("architecture.svg").write_text(drawing, encoding="utf-8")
