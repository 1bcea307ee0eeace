"""The pages of the site: the repository's READMEs and notebooks, and a reference from docstrings.

Each page keeps its path in the repository, so the links between pages work unchanged. A notebook,
and a source file that a page links to, becomes a page too, under its path with the suffix `.md`.
"""

import json
import re
from pathlib import Path
from posixpath import dirname, join, normpath

import griffe
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File

LOG = get_plugin_logger("docstrings")
ROOT = Path(__file__).parent.parent
PAGES = ["*.md", "jax_ddpm/**/*.md", "benchmarks/**/*.md", "benchmarks/**/*.png", "*/*.ipynb"]
ROOMS = ["training", "runs", "data", "interop", "evaluation", "parity", "models", "cpu"]
PACKAGES = ["jax_ddpm", *(f"jax_ddpm.{room}" for room in ROOMS)]
SOURCE_LINK = re.compile(r"(\]\()([^)#:]+)\.(py|ipynb)(?=[)#])")
JOINED = re.compile(r"(?m)(?<=^  )\w+(,\s+\w+)+:")
NAME = re.compile(r"(?<!<b>)<code>(?:(?:jax_)?ddpm\.)?([\w.]+)(?:\([^<]*\))?</code>(?!</a)")


def listed(package):
    """The comments and the names in `__all__`, as pairs of which one is empty."""
    source = (ROOT / package.replace(".", "/") / "__init__.py").read_text()
    return re.findall(r'# (.+)|"(\w+)"', re.search(r"__all__ = \[(.*?)\]", source, re.S)[1])


def entry(path):
    """The name under which Griffe has a public one: `parity.compare` is also a module's."""
    module = ROOT / f"{path.replace('.', '/')}.py"
    return f"{path}.{module.stem}" if module.exists() else path


PUBLIC = {f"{package}.{name}" for package in PACKAGES for _, name in listed(package)}


def on_files(files, config):
    def add(path, content):
        files.append(File.generated(config, path, content=content))

    def add_text(path, text):
        add(path, SOURCE_LINK.sub(r"\1\2.md", text))
        for _, target, suffix in SOURCE_LINK.findall(text):
            target = normpath(join(dirname(path), target))
            source = ROOT / f"{target}.{suffix}"
            if suffix == "py" and source.exists() and f"{target}.md" not in files.src_uris:
                add(f"{target}.md", f"# {source.name}\n\n```python\n{source.read_text()}```\n")

    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".md":
            add_text(name, path.read_text())
        elif path.suffix == ".ipynb":
            add_text(name.replace(".ipynb", ".md"), notebook(path.read_text()))
        else:
            add(name, path.read_bytes())
    for package in PACKAGES:
        add(f"reference/{package}.md", reference(package))
    return files


def notebook(text):
    """A notebook in Markdown, its pictures inside."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                base64 = "".join(data["image/png"]).replace("\n", "")
                parts.append(f"![](data:image/png;base64,{base64})")
            else:
                parts.append(f"``` {{.text .output}}\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts)


def reference(package):
    """An entry for each name in `__all__`, in its order, under the comments there as headings."""
    options = "{heading_level: 1, show_root_full_path: true, members: []}"
    parts = [f"::: {package}\n    options: {options}"]
    for comment, name in listed(package):
        above = f"jax_ddpm.{name}"
        if comment:
            parts.append(f"## {comment[0].upper()}{comment[1:]}")
        elif above in PACKAGES or (above in PUBLIC and package != "jax_ddpm"):
            link = f"[`{name}`][{above}]"
            parts[-1:] = [f"{parts[-1]}, {link}"] if parts[-1][0] == "[" else [parts[-1], link]
        else:
            parts.append(f"::: {entry(f'{package}.{name}')}")
    return "\n\n".join(parts)


def on_page_markdown(text, page, config, files):
    """Warns of a row of the index that opens with a name that is not public."""
    if page.file.src_uri == "jax_ddpm/README.md":
        for name in re.findall(r"(?m)^\| `([\w.]+)", text):
            if f"jax_ddpm.{name}" not in PUBLIC:
                LOG.warning(f"jax_ddpm/README.md: {name} is not public")


def on_page_content(html, page, config, files):
    """A public name links to its entry: `ddim`, `runs.fit`, or `fit` on the page of `runs`."""
    here = page.file.src_uri.removeprefix("reference/").removesuffix(".md")
    if here in PACKAGES:
        html = re.sub("</?em>", "_", html)  # of x̂_0 and β̃_t: docstrings have no emphasis
        if "<blockquote>" in html:
            LOG.warning(f"{here}: an example stands outside the section Examples")

    def link(code):
        for path in (f"{here}.{code[1]}", f"jax_ddpm.{code[1]}"):
            if path in PUBLIC:
                return f'<autoref identifier="{entry(path)}">{code[0]}</autoref>'
        return code[0]

    return html if here.startswith("torch_reference/") else NAME.sub(link, html)


class Names(griffe.Extension):
    """Reads `a, b: …` as a description of both, and warns of names that the code lacks."""

    def on_object(self, *, obj, **others):
        if obj.is_attribute and len(str(obj.value)) > 100:
            obj.value = None  # a table such as RECIPES, too long for a signature
        if obj.docstring is None:
            return
        obj.docstring.value = JOINED.sub(lambda a: "".join(a[0].split()), obj.docstring.value)
        known = {*obj.members, *(parameter.name for parameter in getattr(obj, "parameters", ()))}
        for section in obj.docstring.parsed:
            if section.kind.value in ("parameters", "attributes"):
                for entry in section.value:
                    names = entry.name.split(",")
                    entry.name = ", ".join(names)
                    if unknown := {name.lstrip("*") for name in names} - known:
                        LOG.warning(f"{obj.path} has no {unknown}")
