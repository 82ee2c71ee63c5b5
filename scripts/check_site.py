"""Checks a built site: every link arrives, and nothing is fetched elsewhere.

  python scripts/check_site.py build/site

Of each page all `href` and `src` are followed: the file must exist, and the
anchor must be in it. Pictures, scripts and styles must come from the site
itself, so that it can be read without a network; so must what styles import.
"""

import html.parser
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

# Attributes of elements that a browser fetches without being asked.
FETCHED = {
  ("audio", "src"), ("embed", "src"), ("iframe", "src"), ("img", "src"),
  ("img", "srcset"), ("link", "href"), ("object", "data"), ("script", "src"),
  ("source", "src"), ("source", "srcset"), ("video", "src"),
}  # fmt: skip
# Links that name a page and do not load it.
NAMED = {"canonical", "prev", "next", "alternate"}


class Link(NamedTuple):
  """A link of a page; `fetched`: the browser loads it with the page."""

  target: str
  fetched: bool


class Page(html.parser.HTMLParser):
  """Links and anchors of an HTML file."""

  def __init__(self, path: pathlib.Path):
    super().__init__()
    self.links: list[Link] = []
    self.anchors: set[str] = set()
    self.feed(path.read_text())

  def handle_starttag(self, tag, attrs):
    given = {name: value or "" for name, value in attrs}
    self.anchors.update(given[a] for a in ("id", "name") if a in given)
    named = tag == "link" and NAMED & set(given.get("rel", "").split())
    for name, value in given.items():
      if (tag, name) in FETCHED:
        self.links.append(Link(value.split(" ")[0], not named))
      elif name == "href":
        self.links.append(Link(value, False))


def problems(root: pathlib.Path) -> Iterator[str]:
  """What is wrong, a line each."""
  pages = {path: Page(path) for path in sorted(root.rglob("*.html"))}
  if not pages:
    yield f"{root}: has no pages"
  for path, page in pages.items():
    for link in page.links:
      if reason := _wrong(root, path, link, pages):
        yield f"{path.relative_to(root)}: {link.target}: {reason}"
  for path in sorted(root.rglob("*.css")):
    for target in re.findall(r"url\(\s*[\"']?([^\"')]+)", path.read_text()):
      if urlsplit(target).scheme in ("http", "https") or target[:2] == "//":
        yield f"{path.relative_to(root)}: {target}: comes from another host"


def _wrong(root, path, link: Link, pages) -> str:
  """Why a link does not arrive; "": it does."""
  parts = urlsplit(link.target)
  if parts.scheme == "data":
    return ""
  if parts.scheme or parts.netloc:
    return "comes from another host" if link.fetched else ""
  target = path
  if parts.path:
    start = root if parts.path.startswith("/") else path.parent
    target = (start / unquote(parts.path).lstrip("/")).resolve()
  if target.is_dir():
    target = target / "index.html"
  if not target.exists():
    return "no such file"
  anchor = unquote(parts.fragment)
  if anchor and target in pages and anchor not in pages[target].anchors:
    return f"{target.relative_to(root)} has no such anchor"
  return ""


def main(arguments: Sequence[str] | None = None) -> None:
  """Prints what is wrong and fails, or says how much was right."""
  given = sys.argv[1:] if arguments is None else arguments
  if len(given) != 1:
    sys.exit((__doc__ or "").strip())
  root = pathlib.Path(given[0]).resolve()
  if found := list(problems(root)):
    sys.exit("\n".join([*found, f"{len(found)} broken links in {root}"]))
  pages = [Page(path) for path in root.rglob("*.html")]
  links = sum(len(page.links) for page in pages)
  print(f"{root}: {len(pages)} pages, {links} links, all of them arrive")


if __name__ == "__main__":
  main()
