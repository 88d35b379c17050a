"""What the site needs beside MkDocs: pages that live elsewhere in the repository, and docstrings in Markdown.

The pages of docs/ link to such files as GitHub wants it, ``../benchmarks/README.md``. On the site these files lie at
their path in the repository, ``benchmarks/README.md``, beside the pages of docs/.
"""

import ast
import re
from pathlib import Path

from griffe import Docstring, Extension
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("benchmarks/README.md", "benchmarks/results/*", "examples/results/*", "CONTRIBUTING.md", "LICENSE")
LINK = re.compile(r"(?<=\]\()\.\./")  # to a file outside docs/


def on_files(files, config):
    for pattern in ELSEWHERE:
        for path in sorted(ROOT.glob(pattern)):
            name = str(path.relative_to(ROOT))
            if name.endswith(".md"):
                text = path.read_text(encoding="utf-8")
                # From the repository's root, what lies in docs/ is beside it on the site.
                text = re.sub(r"(?<=\]\()(\.\./)?docs/", r"\1", text)
                files.append(File.generated(config, name, content=text))
            else:
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, **_):
    return LINK.sub("", markdown) if "/" not in page.file.src_uri else markdown


class Markdown(Extension):
    """Sphinx's roles become code, reStructuredText's tables blocks of it, and a setting's ``help`` its docstring."""

    def on_attribute_instance(self, *, node, attr, **_):
        call = getattr(node, "value", None)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "field":
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            if "metadata" in given:
                attr.docstring = Docstring(ast.literal_eval(given["metadata"])["help"], parent=attr)
                attr.value = ast.unparse(given["default"])

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = markdown_of(obj.docstring.value)


def markdown_of(text: str) -> str:
    role = re.compile(r":\w+:`~?\.*([^`]+)`")
    blocks = []
    for line in text.split("\n"):
        if line.startswith("    "):  # code, or an argument's second line
            blocks.append(role.sub(r"\1", line))
        else:
            line = role.sub(r"`\1`", line).replace("``", "`")
            blocks.append(line.replace("_{", "\\_{"))  # a subscript, and no emphasis
    text = "\n".join(blocks)
    return re.sub(r"^(=+( =+)+\n.*\n=+( =+)+)$", r"```text\n\1\n```", text, flags=re.MULTILINE | re.DOTALL)
