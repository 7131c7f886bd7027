"""What MkDocs needs to know of our documents, which are written to be read in the repository too.

A link to a file outside docs/ leads to a copy of it in the site, and one to a folder is only text.
The comment above a block that names its file becomes the title of the block. The folder
reference/ is made from the code.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # MkDocs loads a hook by its path

from tools.reference import PAGES  # noqa: E402

OUTSIDE = ("CHANGELOG.md", ".env.example", "examples/README.md", "examples/*.py")
INTO_DOCS = re.compile(r"\]\((?:\.\./\.?|docs/)")
FOLDER = re.compile(r"\[([^\]]+)\]\([\w/.-]+/\)")
BLOCK = re.compile(r"^<!-- ([^\n]*?) -->\n```(\w+)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        name = str(path.relative_to(ROOT)).removeprefix(".")
        files.append(File.generated(config, name, content=path.read_text(encoding="utf-8")))
    for name, made in PAGES.items():
        files.append(File.generated(config, name, content=made()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri in PAGES:
        return markdown
    return BLOCK.sub(_with_title, FOLDER.sub(r"\1", INTO_DOCS.sub("](", markdown)))


def _with_title(block: re.Match[str]) -> str:
    note, language = block.groups()
    kind, _, name = note.partition(": ")
    return f'```{language} title="{name}"' if kind == "file" else f"```{language}"
