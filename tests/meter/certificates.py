"""Certificates for the tests of TLS, made by openssl: good ones, and each kind of bad one."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

NO_OPENSSL = "openssl is not installed"
HAS_OPENSSL = shutil.which("openssl") is not None
KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]


@dataclass(frozen=True)
class Identity:
    """A certificate and its key, in PEM files."""

    certificate: Path
    key: Path


class Authority:
    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.certificate = directory / f"{name}.pem"
        self._key = directory / f"{name}.key"
        subject = ["-subj", f"/CN={name}", "-days", "30"]
        openssl("req", "-x509", *KEY, "-keyout", self._key, "-out", self.certificate, *subject)

    def issue(self, name: str, alternative: str = "DNS:localhost,IP:127.0.0.1", days: int = 30) -> Identity:
        """`alternative`: subjectAltName. A negative `days` makes a certificate that has expired."""
        made = Identity(self.directory / f"{name}.pem", self.directory / f"{name}.key")
        request, extensions = self.directory / f"{name}.csr", self.directory / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternative}\n")
        openssl("req", *KEY, "-keyout", made.key, "-out", request, "-subj", f"/CN={name}")
        by = ["-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial", "-extfile", extensions]
        openssl("x509", "-req", "-in", request, "-out", made.certificate, "-days", str(days), *by)
        return made


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
