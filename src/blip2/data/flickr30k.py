"""Flickr30k's own annotations: five captions a picture.

results_20130124.token      1000092795.jpg#0<TAB>Two young guys ...
results.csv                 image_name| comment_number| comment
flickr_annotations_30k.csv  raw, sentids, split, filename, img_id: a row a picture, `raw` a list in JSON
"""

from blip2.data import places
from blip2.data.coco import FLICKR_FOLDERS
from blip2.data.faults import Fault
from blip2.data.images_folder import find_images
from blip2.data.pictures import FilePictures
from blip2.data.records import ByImage
from blip2.data.source import Source
from blip2.data.splits import refuse_split
from blip2.data.tables import open_table
from blip2.data.texts import NOT_UTF8, as_texts, is_utf8
from blip2.errors import BadData


def open_flickr30k(place: str, *, images: str | None = None, split: str | None = None) -> Source:
    """The pictures with their captions; a `split` for the file that has that column.

    Raises:
        BadData: the file is of another form.
    """
    if places.suffix_of(place) == ".csv":
        return open_table(place, images=images, split=split, hints=FLICKR_FOLDERS)
    refuse_split(place, "flickr30k", split)
    by_image, faults = ByImage("flickr30k"), []
    with places.open_text(place) as file:
        for number, line in enumerate(file, start=1):
            name, tab, caption = line.rstrip("\r\n").partition("\t")
            image, mark, _ = name.rpartition("#")
            if not is_utf8(line):
                faults.append(Fault(f"line {number}", places.shown(place), NOT_UTF8))
            elif tab and mark and image:
                by_image.add(image, as_texts(caption))
            elif line.strip():
                faults.append(Fault(f"line {number}", places.shown(place), "is not of the form NAME.jpg#0<TAB>caption"))
    if not by_image:
        raise BadData(
            f"{places.shown(place)} has no line of the form NAME.jpg#0<TAB>caption. The layout flickr30k is "
            "results_20130124.token, results.csv or flickr_annotations_30k.csv."
        )
    folder = find_images(places.folder_of(place), images, by_image.names(20), FLICKR_FOLDERS)
    return Source(place, by_image.records(), FilePictures(folder), faults)
