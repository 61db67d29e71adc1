# Copyright: The vfiotool authors
# SPDX-License-Identifier: MIT
# GNU General Public License v3.0+ compatible

from __future__ import annotations


class ModuleDocFragment:
    """What all modules of the collection take."""

    DOCUMENTATION = r"""
options:
  executable:
    description:
      - The program.
    type: str
    default: vfiotool
  root:
    description:
      - A recorded host to look at, or to plan for, instead of the managed one. Nothing can be
        applied there.
    type: path
notes:
  - vfiotool has to be installed on the managed host; changes and what other users' processes have
    open need root.
"""
