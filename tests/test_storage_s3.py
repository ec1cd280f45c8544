from lib import storage


def test_a_file_comes_back_as_it_was_written(s3_bucket):
    url = f"{s3_bucket}/a folder/photo é.bin"
    storage.write_bytes(url, b"content")
    assert storage.read_bytes(url) == b"content"
