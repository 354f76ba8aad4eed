# SPDX-License-Identifier: GPL-2.0-or-later
"""The HTTP API of the daemon: JSON over a Unix socket, described by an OpenAPI document.

One table (`routes.py`) says what there is; the application and the document are both made from it.
"""

from hostd.api.app import make_app

__all__ = ["make_app"]
