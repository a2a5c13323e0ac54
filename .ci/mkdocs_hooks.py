"""The site has the scripts of findings/, which lie beside docs/, so that pages can link them as `../findings/NAME.sh`."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds them as files of the site."""
    for path in sorted((ROOT / "findings").iterdir()):
        if path.suffix in (".sh", ".md"):
            files.append(File(f"findings/{path.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """On the site they are a folder below the pages."""
    return markdown.replace("](../findings/", "](findings/")
