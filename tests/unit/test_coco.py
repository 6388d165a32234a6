"""COCO files: what is read, and what is refused before training starts."""

import json
import re

import pytest
import torch

from fcmae.data.pixels.instances import encoded, is_outside, mask_of
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


def test_values_that_would_count_as_others_are_refused(squares):
    """Of Python, "0" is true, and NaN less than nothing."""

    def spoil(content):
        first, second, third, fourth, fifth, sixth = content["annotations"][:6]
        first["iscrowd"], second["iscrowd"], third["iscrowd"] = "0", 2, True
        fourth["area"], fifth["area"], sixth["area"] = -1, float("nan"), "12"

    with pytest.raises(ConfigError) as error:
        changed(squares, spoil)
    crowd, area = error.value.mistakes
    where = f"data.annotations: {squares / 'changed.json'}: "
    assert (
        crowd == f"{where}2 annotations have an iscrowd that is not 0 or 1: "
        "annotation 1 of 0.png ('0'), annotation 2 of 0.png (2)"
    )
    assert (
        area == f"{where}3 annotations have an area that is no number from 0 on: "
        "annotation 4 of 1.png (-1), annotation 5 of 2.png (nan), annotation 6 of 2.png ('12')"
    )


def test_masks_that_are_empty_or_elsewhere_are_as_boxes_without_area(squares):
    content = json.loads((squares / "objects.json").read_text())
    (left, top, width, height), size = content["annotations"][0]["bbox"], [40, 56]
    elsewhere = [20, 30, 5, 5] if left + width < 18 or top + height < 28 else [0, 0, 5, 5]
    for number, (box, segment) in enumerate(
        (
            ([left, top, width, height], {"size": size, "counts": [40 * 56]}),
            ([left, top, width, height], {"size": size, "counts": encoded(torch.zeros(40, 56).byte())["counts"]}),
            (elsewhere, content["annotations"][0]["segmentation"]),
            ([40, 20, 9, 9], [[1, 1, 9, 1, 9, 9, 1, 9]]),
            ([40, 20, 9, 9], [[1, 1, 9, 1, 9, 9, 1, 9], [41, 21, 45, 21, 45, 25]]),  # a part is inside
        )
    ):
        content["annotations"].append({**content["annotations"][0], "id": 100 + number, "bbox": box,
                                       "segmentation": segment})  # fmt: skip
    file = write_json(squares, content, "changed.json")
    told = "4 masks are empty or outside of their box: annotation 100 of 0.png, annotation 101 of 0.png, annotation 102"
    with pytest.raises(ConfigError, match=told):
        CocoObjects(file, squares / "images", "data.annotations")
    source = CocoObjects(file, squares / "images", "data.annotations", skip=True)
    assert told in source.notes[0]
    assert len(source.boxes) == len(content["annotations"]) - 4


def test_a_mask_is_outside_of_a_box_where_none_of_its_pixels_is_inside():
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(200):
        left, top = (int(torch.randint(0, 8, (), generator=generator)) for _ in range(2))
        mask = torch.zeros(10, 12, dtype=torch.uint8)
        rows, cols = (int(torch.randint(0, 4, (), generator=generator)) for _ in range(2))
        mask[top : top + rows, left : left + cols] = 1
        x, y = (int(torch.randint(0, 7, (), generator=generator)) for _ in range(2))
        segment = encoded(mask)
        assert mask_of(segment, (10, 12)).equal(mask)
        inside = bool(mask[y : y + 3, x : x + 4].any())
        assert is_outside(segment, (10, 12), [x, y, x + 4, y + 3], 0) != inside
        found.append(inside)
    assert 20 < sum(found) < 180


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
