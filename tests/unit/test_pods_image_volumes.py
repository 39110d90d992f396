"""Sub-paths of image volumes: what an image's links lead to stays inside the image."""

from __future__ import annotations

from pathlib import Path

import pytest

from crio_native.errors import InvalidArgument
from crio_native.pods import image_volumes

pytestmark = pytest.mark.root


@pytest.fixture
def image(tmp_path: Path) -> Path:
    place = tmp_path / "image"
    (place / "etc/inner").mkdir(parents=True)
    (place / "etc/passwd").write_text("the image's")
    (tmp_path / "outside").mkdir()
    for name, target in {
        "absolute": "/etc",
        "up": "../../../../outside",
        "chain": "absolute/inner",
        "host": str(tmp_path / "outside"),
        "loop": "loop",
        "magic": "/proc/self/root",
    }.items():
        (place / name).symlink_to(target)
    return place


@pytest.mark.parametrize(
    ("sub_path", "expected"),
    [("", ""), ("etc", "etc"), ("absolute", "etc"), ("absolute/passwd", "etc/passwd"), ("chain", "etc/inner")],
)
def test_links_are_the_images_own(image: Path, sub_path: str, expected: str) -> None:
    assert image_volumes._inside(image, sub_path, 0).rstrip("/") == str(image / expected).rstrip("/")


@pytest.mark.parametrize("sub_path", ["up", "host", "loop", "magic/etc", "no/such", "etc/passwd/x"])
def test_what_leads_out_is_not_there(image: Path, sub_path: str) -> None:
    with pytest.raises(InvalidArgument, match=r"config\.mounts\[3\]\.image_sub_path"):
        image_volumes._inside(image, sub_path, 3)
