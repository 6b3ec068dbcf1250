"""Every page of the documentation is in the navigation of the site."""

import tomllib

from repository import ROOT


def test_every_page_is_in_the_navigation_once_under_its_own_title():
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    listed = [(page, title) for entry in nav for title, page in entry.items()]
    pages = {path.name: path.read_text().splitlines()[0] for path in (ROOT / "docs").glob("*.md")}
    assert sorted(page for page, _ in listed) == sorted(pages)
    assert {page: f"# {title}" for page, title in listed} == pages
