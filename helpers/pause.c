/*
 * `crio-monitor pause`: process 1 of a PID namespace that a pod's containers share.
 *
 * It does what the kernel expects of a process 1, which is to reap, and ends when it is told to.
 */
#include "monitor.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

int pause_main(void)
{
	sigset_t wanted;

	/* Blocked, so that sigwaitinfo gets them: what process 1 neither blocks nor handles, the kernel discards. */
	sigemptyset(&wanted);
	sigaddset(&wanted, SIGCHLD);
	sigaddset(&wanted, SIGTERM);
	sigaddset(&wanted, SIGINT);
	sigprocmask(SIG_SETMASK, &wanted, NULL);
	signal(SIGCHLD, SIG_DFL); /* an inherited SIG_IGN would reap for us, and never tell */
	prctl(PR_SET_NAME, "crio-pause");

	for (;;) {
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
		int signal_number = sigwaitinfo(&wanted, NULL);
		if (signal_number == SIGTERM || signal_number == SIGINT)
			return 0;
	}
}
