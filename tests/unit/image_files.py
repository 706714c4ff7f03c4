"""Small image files, written the ways users have them."""

import nibabel as nib
import numpy as np
import pydicom
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from biovfm_monai.data import modalities, read_image
from biovfm_monai.errors import InputError


def write_nifti(path, array, spacing=(1, 1, 1), stored="RAS"):
    """A volume whose axes run right, anterior, superior, saved in another order of axes."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-7, 11, 30)
    image = nib.Nifti1Image(np.asarray(array, dtype=np.float32), affine)
    nib.save(image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(stored))), path)
    return path


def write_png(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def write_dicom(path, series, number=0, value=0, **tags):
    """One slice of 6 x 8 pixels of Hounsfield units 2 * value - 1000, three millimetres above the last one."""
    d = pydicom.Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = CTImageStorage
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = generate_uid()
    d.SeriesInstanceUID, d.StudyInstanceUID, d.Modality, d.PatientID = series, "1.2", "CT", "secret-4711"
    d.Rows, d.Columns, d.BitsAllocated, d.BitsStored, d.HighBit = 6, 8, 16, 16, 15
    d.PixelRepresentation, d.SamplesPerPixel, d.PhotometricInterpretation = 1, 1, "MONOCHROME2"
    d.PixelSpacing, d.ImageOrientationPatient, d.ImagePositionPatient = [1, 1], [1, 0, 0, 0, 1, 0], [0, 0, 3.0 * number]
    d.RescaleSlope, d.RescaleIntercept = 2, -1000
    d.PixelData = np.full((6, 8), value, np.int16).tobytes()
    for name, content in tags.items():
        setattr(d, name, content)
    path.parent.mkdir(exist_ok=True)
    d.save_as(path, enforce_file_format=True)
    return path


def preset(name, path, **options):
    """The image in a file after the preset of a modality."""
    return getattr(modalities, name)("image", **options)({"image": read_image(path)})["image"]


def cause_of(call, *arguments):
    """The user's mistake behind the RuntimeError that MONAI wraps it in."""
    with pytest.raises(RuntimeError) as caught:
        call(*arguments)
    assert isinstance(caught.value.__cause__, InputError)
    return str(caught.value.__cause__)
