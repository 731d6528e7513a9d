"""Cases of lists that were made by hand."""

from sam2sgp.transforms.cases import completed


def test_files_of_one_name_in_several_folders_are_cases_and_patients_of_their_own():
    images = ["/data/p1/ct.nii.gz", "/data/p2/ct.nii.gz", "/data/p2/ct.png", "/data/p3/other.nii.gz"]
    names = ["data_p1_ct.nii.gz", "data_p2_ct.nii.gz", "data_p2_ct.png", "other"]
    found = completed({"image": image} for image in images)
    assert [case["name"] for case in found] == [case["patient"] for case in found] == names
    named = completed([{"image": images[0], "name": "one", "patient": "p"}, {"image": images[1], "group": "ct"}])
    assert [(case["name"], case["patient"], case["group"]) for case in named] == [
        ("one", "p", None),
        ("ct", "ct", "ct"),
    ]
