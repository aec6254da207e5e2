"""What _config.yml cannot express: macros from one notation file, tables made from data, accessible pages."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import yaml
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from myst_nb.ext.glue.roles import PasteTextRole
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.docutils import SphinxDirective

BOOK = Path(__file__).resolve().parents[1]
NOTATION = BOOK / "notation.yml"
RUN_TIMES = BOOK / "run_times.json"

# The book is complete without a network, so names of other projects have no inventory to be looked up in.
# Names of this library are looked up, and a wrong one stops the build.
ELSEWHERE = [
    (
        "py:.*",
        r"(torch|numpy|np|pandas|pd|matplotlib|scipy|sklearn|collections|contextlib|typing|pathlib|pyarrow|optuna|fastapi"
        r"|gymnasium)\..*",
    ),
    (
        "py:class",
        r"(ArrayLike|NDArray|Tensor|Generator|Path|optional|array_like|callable|NamedTuple|Axes|Figure|Line2D|DataFrame|Series"
        r"|nn\.Module|nn\.Linear|PreTrainedModel|PreTrainedTokenizerBase|Policy|Advantage|Loss|OutputLoss|Parameters|Surrogate"
        r"|Collect|Update|Suppress|Memory|Counts|Teacher|AutoresetMode|Pools|Intent"
        r"|ecomlib\.configuration\.(FamilyT|OuterT))",
    ),
]


def read_notation(path: Path = NOTATION) -> list[dict]:
    """The entries of the notation file; none when it does not exist.

    An entry has ``symbol`` (LaTeX), ``meaning`` and optionally ``macro`` (a name: ``\\name`` stands for the symbol),
    ``arguments`` (how many the macro takes), ``example`` (what the table shows in place of the symbol), ``code``
    (the name in the library) and ``group`` (the part of the table it belongs to).
    """
    if not path.exists():
        return []
    entries = yaml.safe_load(path.read_text(encoding="utf-8")) or []
    known = {"symbol", "meaning", "macro", "arguments", "example", "code", "group"}
    for entry in entries:
        if unknown := set(entry) - known:
            raise ValueError(f"{path.name}: unknown keys {sorted(unknown)} in {entry}; known: {sorted(known)}")
        if missing := {"symbol", "meaning"} - set(entry):
            raise ValueError(f"{path.name}: {sorted(missing)} missing in {entry}")
    return entries


def macros(entries: list[dict]) -> dict:
    """MathJax's form of the macros: name -> LaTeX, or [LaTeX, number of arguments]."""
    found = {}
    for entry in entries:
        if name := entry.get("macro", "").lstrip("\\"):
            arguments = entry.get("arguments", 0)
            found[name] = [entry["symbol"], arguments] if arguments else entry["symbol"]
    return found


class Table(SphinxDirective):
    """A directive that writes a Markdown table and lets the page's own parser read it."""

    def parse(self, lines: list[str], source: Path) -> list[nodes.Node]:
        self.env.note_dependency(str(source))
        box = nodes.container(classes=["book-table"])
        self.state.nested_parse(StringList(lines, str(source)), self.content_offset, box)
        return [box]


class NotationTable(Table):
    """``{notation}``: the notation table, or with ``:group: name`` a part of it."""

    option_spec = {"group": directives.unchanged}

    def run(self):
        group = self.options.get("group")
        rows = [e for e in read_notation() if group is None or e.get("group") == group]
        if not rows:
            raise self.error(f"no entry in {NOTATION.name}" + (f" has the group {group!r}" if group else ""))
        lines = ["| Symbol | In the code | Meaning |", "|:--|:--|:--|"]
        for e in rows:
            symbol = e.get("example") or ("\\" + e["macro"].lstrip("\\") if e.get("macro") else e["symbol"])
            cells = (f"${symbol}$", f"`{e['code']}`" if e.get("code") else "", " ".join(e["meaning"].split()))
            lines.append("| " + " | ".join(c.replace("|", r"\|") for c in cells) + " |")
        return self.parse(lines, NOTATION)


class RunTimes(Table):
    """``{run-times}``: seconds a chapter took when its stored outputs were last verified, and on what."""

    def run(self):
        if not RUN_TIMES.exists():
            raise self.error(f"{RUN_TIMES.name} is missing: run `make run-times`")
        record = json.loads(RUN_TIMES.read_text(encoding="utf-8"))
        lines = ["| Chapter | Seconds |", "|:--|--:|"]
        lines += [f"| {{doc}}`/{name}` | {seconds:.0f} |" for name, seconds in record["seconds"].items()]
        lines += [f"| All chapters | {sum(record['seconds'].values()):.0f} |", ""]
        lines += ["| Measured with | |", "|:--|:--|"]
        lines += [f"| {name} | {value} |" for name, value in record["environment"].items()]
        return self.parse(lines, RUN_TIMES)


def _configure(app: Sphinx, config) -> None:
    config.nitpick_ignore_regex = [*config.nitpick_ignore_regex, *ELSEWHERE]
    config.html_theme_options["navbar_persistent"] = []  # the side bar has the search field already
    config.html_context.setdefault("default_mode", "auto")
    config.templates_path.insert(0, str(BOOK / "_templates"))
    # An undefined macro is an error that the page test sees, not red text that nobody sees.
    tex = {"macros": macros(read_notation()), "packages": {"[-]": ["noundefined"]}}
    config.mathjax3_config = {"tex": tex, "options": {"enableMenu": False}}


def _page(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Drop the theme's live-code scripts (a fault on every page, and a remote address); mend accessibility."""
    seen, keep = set(), []
    for script in context.get("script_files", []):
        body, name = script.attributes.get("body", ""), script.filename or ""
        if "THEBE_JS_URL" in body or "sphinx-thebe.js" in name:
            continue
        if (name, body) not in seen:
            seen.add((name, body))
            keep.append(script)
    if "script_files" in context:
        context["script_files"][:] = keep
    if body := context.get("body"):
        body = re.sub(r'<script type="text/x-thebe-config">.*?</script>', "", body, flags=re.S)
        body = body.replace('role="doc-biblioentry"', 'role="listitem"')
        body = re.sub(r"<th([^>]*)>(<p>)?\s*(</p>)?</th>", r"<td\1></td>", body)
        body = body.replace('<summary aria-label="Toggle hidden content">', "<summary>")
        context["body"] = body


def _front_door(app: Sphinx, exception: Exception | None) -> None:
    """The book's first page is in a folder: the index beside it is a page of its own, not a bare redirect."""
    index = Path(app.outdir, "index.html")
    if exception or app.builder.name != "html" or app.config.root_doc == "index":
        return
    target = html.escape(app.builder.get_target_uri(app.config.root_doc))
    title = html.escape(app.config.html_title or app.config.project)
    index.write_text(
        f'<!DOCTYPE html>\n<html lang="{app.config.language}">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f'<meta http-equiv="refresh" content="0; url={target}">\n</head>\n'
        f'<body><main><h1>{title}</h1><p><a href="{target}">Open the book</a></p></main></body>\n</html>\n',
        encoding="utf-8",
    )


_paste_text = PasteTextRole.run


def _paste_text_with_optional_format(role: PasteTextRole):
    """``{glue:text}`page.ipynb::key```: the role takes the last colon for that of a format, which may be left out."""
    if "::" in role.text and ":" not in role.text.split("::", 1)[1]:
        role.text += ":s"
    return _paste_text(role)


def setup(app: Sphinx) -> dict:
    PasteTextRole.run = _paste_text_with_optional_format
    # napoleon takes what stands before a colon in a field's explanation for its type; here it is prose.
    GoogleDocstring._parse_attribute_docstring = lambda self: self._consume_to_end()
    app.add_directive("notation", NotationTable)
    app.add_directive("run-times", RunTimes)
    app.connect("config-inited", _configure, priority=400)
    app.connect("html-page-context", _page, priority=900)
    app.connect("build-finished", _front_door, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
