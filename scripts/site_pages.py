"""Hooks of mkdocs: pages of the site that do not lie in docs/, and links to files that are not pages."""

import re
from pathlib import Path
from posixpath import join, normpath

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# Page of the site -> the file that it is made of.
PAGES = {"index.md": "README.md", "benchmarks.md": "benchmarks/README.md", "changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files, config):
    for page, path in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown, page, **_):
    """Point links at pages of the site; what is only a file of the repository keeps its text."""
    here = page.file.src_uri
    source = PAGES.get(here, join("docs", here))

    def link(found):
        text, target, anchor = found[1], found[2], found[3] or ""
        path = normpath(join(source, "..", target))
        to = next((name for name, made_of in PAGES.items() if made_of == path), None)
        if to is None and path.startswith("docs/") and path.endswith(".md"):
            to = path.removeprefix("docs/")
        if to is None:
            return text if text.startswith("`") else f"`{text}`"
        return f"[{text}]({'../' * here.count('/')}{to}{anchor})"

    return LINK.sub(link, markdown)
