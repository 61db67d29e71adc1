#include "virtio/worker_state.h"

#include <errno.h>
#include <sys/epoll.h>

/* How long a controller that has commands is looked at, before it is slept on. */
#define PORT_NS 100000u

/* Whether something is out on a controller. */
static bool ports_are_busy(const struct vt_worker *worker)
{
	for (uint32_t i = 0; i < worker->port_count; i++)
		if (vt_port_is_busy(worker->ports[i]))
			return true;
	return false;
}

void vt_attend_ports(struct vt_worker *worker)
{
	if (!ports_are_busy(worker))
		return;
	if (vt_serve_finished(worker))
		worker->port_at = vt_now_ns();
	for (uint32_t i = 0; i < worker->port_count; i++)
		vt_port_tell(worker->ports[i]);
}

bool vt_watches_ports(struct vt_worker *worker)
{
	bool busy = false, mute = false;

	for (uint32_t i = 0; i < worker->port_count; i++)
		if (vt_port_is_busy(worker->ports[i])) {
			busy = true;
			mute = mute || vt_port_event(worker->ports[i]) < 0;
		}
	return mute || (busy && vt_now_ns() - worker->port_at < PORT_NS);
}

/* A port and what is to become of it. */
struct port_change {
	struct vt_port *port;
	bool works;
};

static int run_add_port(struct vt_command *command)
{
	struct vt_worker *worker = command->queue;
	struct vt_port *port = command->argument;
	struct epoll_event event = { .events = EPOLLIN | EPOLLET, .data.ptr = worker->ports };

	if (worker->port_count == VT_WORKER_PORTS)
		return -ENOSPC;
	if (vt_port_event(port) >= 0 &&
	    epoll_ctl(worker->epoll, EPOLL_CTL_ADD, vt_port_event(port), &event))
		return -errno;
	worker->ports[worker->port_count++] = port;
	return 0;
}

int vt_worker_add_port(struct vt_worker *worker, struct vt_port *port)
{
	struct vt_command command = { .run = run_add_port, .queue = worker, .argument = port };

	return vt_worker_ask(worker, &command);
}

static int run_remove_port(struct vt_command *command)
{
	struct vt_worker *worker = command->queue;
	struct vt_port *port = command->argument;

	if (vt_port_is_busy(port))
		return -EBUSY;
	for (uint32_t i = 0; i < worker->port_count; i++)
		if (worker->ports[i] == port) {
			worker->ports[i] = worker->ports[--worker->port_count];
			if (vt_port_event(port) >= 0)
				epoll_ctl(worker->epoll, EPOLL_CTL_DEL, vt_port_event(port), NULL);
			break;
		}
	return 0;
}

int vt_worker_remove_port(struct vt_worker *worker, struct vt_port *port)
{
	struct vt_command command = { .run = run_remove_port, .queue = worker, .argument = port };

	return vt_worker_ask(worker, &command);
}

static int run_port_down(struct vt_command *command)
{
	vt_port_down(command->argument);
	return 0;
}

void vt_worker_port_down(struct vt_worker *worker, struct vt_port *port)
{
	struct vt_command command = { .run = run_port_down, .argument = port };

	vt_worker_ask(worker, &command);
}

static int run_port_up(struct vt_command *command)
{
	struct port_change *change = command->argument;

	vt_port_up(change->port, change->works);
	return 0;
}

void vt_worker_port_up(struct vt_worker *worker, struct vt_port *port, bool works)
{
	struct port_change change = { port, works };
	struct vt_command command = { .run = run_port_up, .argument = &change };

	vt_worker_ask(worker, &command);
}
