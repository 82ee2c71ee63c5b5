"""A site with a broken link, or one that loads from elsewhere, is refused."""

import pytest

from scripts import check_site

GOOD = """<html><head><link rel="stylesheet" href="a.css">
<link rel="canonical" href="https://example.org/"></head><body id="top">
<a href="b/#there">b</a> <a href="https://example.org">elsewhere</a>
<a href="#top">up</a> <img src="p.png"></body></html>"""


@pytest.fixture
def site(tmp_path):
  (tmp_path / "b").mkdir()
  (tmp_path / "index.html").write_text(GOOD)
  (tmp_path / "b" / "index.html").write_text(
    '<h2 id="there">x</h2><a href="..">home</a><a href="/">root</a>'
  )
  (tmp_path / "a.css").write_text("body { background: url('p.png') }")
  (tmp_path / "p.png").write_bytes(b"")
  return tmp_path


def test_a_site_of_its_own_passes(site, capsys):
  check_site.main([str(site)])
  assert "2 pages, 8 links" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    ("b/#there", "c/", "index.html: c/: no such file"),
    ("b/#there", "b/#nowhere", "b/index.html has no such anchor"),
    ("p.png", "https://example.org/p.png", "comes from another host"),
    ("a.css", "//example.org/a.css", "comes from another host"),
  ],
)
def test_what_is_wrong_is_named(site, old, new, message):
  page = site / "index.html"
  page.write_text(page.read_text().replace(old, new))
  with pytest.raises(SystemExit, match=message):
    check_site.main([str(site)])


def test_what_a_style_loads_counts(site):
  (site / "a.css").write_text("@import url(https://example.org/x.css);")
  with pytest.raises(SystemExit, match="a.css: https://example.org/x.css"):
    check_site.main([str(site)])


def test_an_empty_folder_is_no_site(tmp_path):
  with pytest.raises(SystemExit, match="has no pages"):
    check_site.main([str(tmp_path)])
