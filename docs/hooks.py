"""What the site needs besides Markdown: links out of docs/, and docstrings as mkdocstrings can read them."""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

# Links to files of the repository that are no part of the site ---------------------------------------------------------


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link that leaves docs/ becomes the file's path, since the site does not know where the repository is hosted."""
    up = "../" * (page.file.src_uri.count("/") + 1)
    return re.sub(rf"(?<!!)\[([^\]]+)\]\({re.escape(up)}([^)#]+)(?:#[^)]*)?\)", _as_path, markdown)


def _as_path(link: re.Match[str]) -> str:
    text, path = link.groups()
    return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"


# Docstrings ------------------------------------------------------------------------------------------------------------


class Docstrings(griffe.Extension):
    """Docstrings as `rendered`, comments behind fields as their docstrings, and `forward` as a member to be shown."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rendered(obj.docstring.value)

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        if func.name == "forward" and func.docstring is None:
            func.docstring = griffe.Docstring("What a call takes, and gives.", parent=func)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        comment = re.search(r"#\s*(?!type:)([^#]+)$", attr.lines[0]) if attr.docstring is None and attr.lines else None
        if comment and attr.annotation is not None:
            attr.docstring = griffe.Docstring(comment[1].strip(), parent=attr)


def rendered(docstring: str) -> str:
    """A docstring as Markdown: formulas as HTML, other `<` as they are meant, and sections as griffe knows them."""
    text = re.sub(r"^Example::?$", "Examples:", inspect.cleandoc(docstring), flags=re.MULTILINE)
    text = re.sub(r"^( +)(\w+(?:, \w+)+): ([a-z].*)$", _one_by_one, text, flags=re.MULTILINE)
    text = "\n\n".join(map(_escaped, text.split("\n\n")))
    block = re.compile(r"^( *)\.\. math::([^\n]*(?:\n\1 +\S[^\n]*)*)", re.MULTILINE)
    text = block.sub(lambda found: f'{found[1]}<p class="formula">{formula(found[2])}</p>\n', text)
    return re.sub(r":math:`([^`]+)`", lambda found: f'<span class="formula">{formula(found[1])}</span>', text)


def _one_by_one(arguments: re.Match[str]) -> str:
    indent, names, meaning = arguments.groups()
    return "\n".join(f"{indent}{name}: {meaning}" for name in names.split(", "))


def _escaped(paragraph: str) -> str:
    """`<` outside of code, where Markdown would take <P, C> for a tag."""
    if ">>>" in paragraph:
        return paragraph
    parts = re.split(r"(`+[^`]+`+)", paragraph)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


SYMBOLS = {
    "langle": "⟨", "rangle": "⟩", "sum": "Σ", "rho": "ρ", "tau": "τ", "beta": "β", "lambda": "λ", "delta": "δ", "pi": "π",
    "arg": "arg ", "max": "max", "min": "min", "log": "log ", "exp": "exp", "cos": "cos", "qquad": "\u2003\u2003", "quad": "\u2003",
    "|": "‖", "_": "_", ",": " ",
}  # fmt: skip
UNITS = {"12": "½"}


def formula(latex: str) -> str:
    """LaTeX, of which this knows what the docstrings have, as a line of HTML that Markdown leaves alone.

    Raises:
        ValueError: for a command that it does not know.
    """
    text = " ".join(latex.split()).replace("\\Big", "")
    text = re.sub(r"\\tfrac(\d\d)", lambda found: UNITS[found[1]], text)
    while (changed := re.sub(r"\\(?:mathrm|text)\{([^{}]*)\}", r"\1", text)) != text:
        text = changed
    text = re.sub(r"\\sqrt\{([^{}]*)\}", r"√(\1)", text)
    text = re.sub(r"\\(?=_)", "\0", text)  # an underscore that is meant
    while True:
        fraction = re.search(r"\\frac\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", text)
        if fraction is None:
            break
        above, below = (part if re.fullmatch(r"[\w^\\]+", part) else f"({part})" for part in fraction.groups())
        rest = text[fraction.end() :]
        ends = not rest.strip() or rest.strip()[0] in "+-,)}"
        text = text[: fraction.start()] + (f"{above} / {below}" if ends else f"({above} / {below})") + rest
    text = re.sub(r"\\([a-zA-Z]+|[|,])", _symbol, text)
    for mark, tag in (("_", "sub"), ("^", "sup")):
        script = re.compile(rf"(?<!\0){re.escape(mark)}(?:\{{([^{{}}]*)\}}|(\S))")
        while (changed := script.sub(lambda found, tag=tag: f"<{tag}>{found[1] or found[2]}</{tag}>", text)) != text:
            text = changed
    text = text.replace("\0", "").replace("{", "").replace("}", "")
    text = re.sub(r"⟨\s+|\s+⟩", lambda found: found[0].strip(), re.sub(" {2,}", " ", text.strip()))
    return text.translate({ord(mark): f"&#{ord(mark)};" for mark in "*_|"})


def _symbol(command: re.Match[str]) -> str:
    if command[1] not in SYMBOLS:
        raise ValueError(f"formula: unknown command \\{command[1]}")
    return SYMBOLS[command[1]]
