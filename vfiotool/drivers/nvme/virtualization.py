"""Virtualization Enhancements: what a PF gives the controllers of its VFs.

Source: NVM Express Base Specification 2.0, 5.25 and 8.2.6.
"""

from __future__ import annotations

from vfiotool.drivers.nvme import spec as nvme_spec
from vfiotool.drivers.nvme.controller import Controller
from vfiotool.drivers.nvme.identify import SecondaryController
from vfiotool.errors import Unsupported


def manage(
    controller: Controller, action: int, controller_id: int, resource: int = 0, count: int = 0
) -> int:
    """Virtualization Management (5.25) on a PF; returns how many resources were assigned.
    Raises Unsupported where the controller has no such command."""
    if not controller.identity.virtualization:
        raise Unsupported(f"{controller.device.name} has no virtualization management")
    dwords = (action | resource << 8 | controller_id << 16, count)
    return controller.admin(nvme_spec.command(nvme_spec.VIRTUALIZATION, dwords=dwords)).result


def secondaries(controller: Controller) -> list[SecondaryController]:
    """The controllers of this PF's VFs."""
    raw = controller.identify(nvme_spec.CNS_SECONDARY_CONTROLLERS)
    return SecondaryController.parse_list(raw)


def release_flexible(controller: Controller) -> Controller:
    """Free the PF's flexible queues and interrupts for its VFs (8.2.6): resets the function,
    as only that makes it so, and returns its controller, brought up anew. Any VFs go."""
    for resource in (nvme_spec.QUEUE_RESOURCES, nvme_spec.INTERRUPT_RESOURCES):
        manage(controller, nvme_spec.ASSIGN_PRIMARY, controller.identity.controller_id, resource)
    controller.close()
    controller.device.reset()
    return Controller(controller.device)


def give(controller: Controller, controller_id: int, queues: int, interrupts: int) -> None:
    """Assign queue pairs and interrupts (the admin ones counted in) to a VF and bring it
    online. It stays so until this controller is closed, and must be reset to come up, as
    opening it through VFIO does."""
    manage(controller, nvme_spec.SECONDARY_OFFLINE, controller_id)
    for resource, count in (
        (nvme_spec.QUEUE_RESOURCES, queues),
        (nvme_spec.INTERRUPT_RESOURCES, interrupts),
    ):
        manage(controller, nvme_spec.ASSIGN_SECONDARY, controller_id, resource, count)
    manage(controller, nvme_spec.SECONDARY_ONLINE, controller_id)
