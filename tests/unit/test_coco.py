"""COCO files: what is read, and what is refused before training starts."""

import json
import re

import pytest

from fcmae.data.sources.coco import CocoImages, CocoObjects
from fcmae.errors import ConfigError
from tests.coco_files import write_coco, write_json


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    write_coco(folder)
    return folder


# Files


def changed(squares, change):
    content = json.loads((squares / "objects.json").read_text())
    change(content)
    return CocoObjects(write_json(squares, content, "changed.json"), squares / "images", "data.annotations")


def test_objects_are_read_image_by_image(squares):
    content = json.loads((squares / "objects.json").read_text())
    source = CocoObjects(squares / "objects.json", squares / "images", "data.annotations")
    assert (source.class_names, source.category_ids, source.most) == (["red", "green"], [3, 7], 2)
    assert source.notes == ["data.annotations: 1 of 6 images have no boxes"]
    assert len(source[5].label.boxes) == 0
    for index, image in enumerate(content["images"]):
        mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        found = source.objects(index)
        for number, annotation in enumerate(mine):
            left, top, width, height = annotation["bbox"]
            assert found.boxes[number].tolist() == [left, top, left + width, top + height]
            assert found.classes[number] == {3: 0, 7: 1}[annotation["category_id"]]
            assert found.crowd[number] == bool(annotation["iscrowd"])
            assert found.segments[number] == annotation["segmentation"]
    assert CocoImages(squares / "objects.json", squares / "images", "x")[0].label is None


def test_all_mistakes_are_told_together_with_the_first_offenders(squares):
    def spoil(content):
        images, annotations = content["images"], content["annotations"]
        images[1]["file_name"], images[2]["file_name"] = "gone.png", "../objects.json"
        images[3]["id"] = images[0]["id"]
        images.append({"id": 99})
        annotations[0]["bbox"], annotations[1]["bbox"] = [5, 5, 0, 9], [50, 5, 20, 9]
        annotations[8]["category_id"] = 1
        annotations[9]["id"] = 1
        annotations.append({**annotations[0], "id": 77, "image_id": 5})
        annotations.append({**annotations[0], "id": 78, "bbox": [1, 1, 5, 5],
                            "segmentation": {"size": [5, 5], "counts": [25]}})  # fmt: skip
        content["categories"].append({"id": 3, "name": "again"})
        for number, box in enumerate(("x", [1, 1, 1], [1, 1, "2", 2], [10**400, 1, 2, 2], [float("nan"), 1, 2, 2])):
            annotations.append({**annotations[0], "id": 100 + number, "area": 10**400, "bbox": box})

    with pytest.raises(ConfigError) as error:
        changed(squares, spoil)
    lines = error.value.mistakes
    where = f"data.annotations: {squares / 'changed.json'}: "
    assert all(line.startswith(where) for line in lines)
    told = "\n".join(line.removeprefix(where) for line in lines)
    for line in (
        rf"1 images are not in {squares / 'images'}: gone.png",
        rf"1 images lie outside of {squares / 'images'}: ../objects.json",
        r"1 images have the id of another: 3.png \(10\)",
        r"1 images without file_name, id, height or width: number 7",
        r"7 boxes have no area in their image, or reach out of it: annotation 1 of 3.png, annotation 2 of 3.png, anno",
        r"1 annotations are of a category that is not listed: annotation 9 \(category_id 1\)",
        r"1 annotations have no id, or that of another: annotation 1",
        r"\d annotations are of an image that is not listed: annotation .* \(image_id 13\)",
        r"1 masks are wrong: annotation 78 of 3.png: its run lengths are of 5x5 pixels, the image has 56x40",
        r"1 categories have the id or name of another: again \(3\)",
    ):
        assert re.search(f"^{line}", told, re.MULTILINE), (line, told)
    assert len(lines) == 10


NO_PATH = '{"images": [{"file_name": "%s", "id": 1, "height": 4, "width": 4}], "annotations": [], "categories": []}'


def test_other_files_are_refused_in_one_line(squares):
    for text, message in (
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must be a COCO file, .*; got a list"),
        ('{"images": 1}', "must be a COCO file, .*; got no list `images`"),
        ('{"images": [], "annotations": []}', "its list images is empty"),
        (NO_PATH % r"\ud800.png", "1 images are not in .*: .*ud800.png"),
        (NO_PATH % r"\u0000.png", "1 images are not in .*: .*x00.png"),
    ):
        (squares / "other.json").write_text(text)
        with pytest.raises(ConfigError, match=message) as error:
            CocoObjects(squares / "other.json", squares / "images", "data.annotations")
        assert all(line.startswith("data.annotations: ") for line in error.value.mistakes)


def test_sizes_of_images_are_compared_with_the_file(squares):
    with pytest.raises(ConfigError, match=r"1 images have another size than it says: 5.png is 56x40, not 56x41"):
        changed(squares, lambda content: content["images"][5].update(height=41))


def test_wrong_boxes_are_left_out_if_asked(squares):
    content = json.loads((squares / "objects.json").read_text())
    content["annotations"][0]["bbox"][2] = 0
    file = write_json(squares, content, "changed.json")
    source = CocoObjects(file, squares / "images", "data.annotations", skip=True)
    assert "1 boxes have no area in their image, or reach out of it: annotation 1 of 0.png; left out" in source.notes[0]
    assert len(source.boxes) == len(content["annotations"]) - 1
