/* What a hostile container or a hostile owner of a volume runs: static, so that it needs nothing of the image. */

#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Exchange two names for ever: whoever looks first and acts then acts on the other one. */
static _Noreturn void swap(const char *one, const char *other)
{
	for (;;)
		syscall(SYS_renameat2, AT_FDCWD, one, AT_FDCWD, other, 2 /* RENAME_EXCHANGE */);
}

static int known(const struct stat *found, const char *path)
{
	struct stat ours;
	return stat(path, &ours) == 0 && ours.st_dev == found->st_dev && ours.st_ino == found->st_ino;
}

/* Catch a process that has entered the container but is still a program of the host: its executable, its
   descriptors, its memory. */
static int look_at(const char *pid)
{
	static const char *names[] = {"exe", "mem", "fd", "map_files", "cwd", "root", "environ"};
	char path[300];
	struct stat found;

	snprintf(path, sizeof path, "/proc/%s/exe", pid);
	int exe = open(path, O_RDONLY | O_CLOEXEC);
	if (exe < 0)
		return 0;
	int foreign = fstat(exe, &found) == 0 && !known(&found, "/proc/self/exe") && !known(&found, "/bin/busybox");
	close(exe);
	if (!foreign)
		return 0;
	printf("caught %s:", pid);
	for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
		snprintf(path, sizeof path, "/proc/%s/%s", pid, names[i]);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd >= 0) {
			printf(" %s", names[i]);
			close(fd);
		}
	}
	printf("\n");
	fflush(stdout);
	return 1;
}

static int watch(int seconds)
{
	time_t end = time(NULL) + seconds;
	char self[16];
	int caught = 0;

	snprintf(self, sizeof self, "%d", getpid());
	puts("watching");
	fflush(stdout);
	while (time(NULL) < end && caught < 5) {
		DIR *proc = opendir("/proc");
		struct dirent *entry;
		while (proc && (entry = readdir(proc)))
			if (entry->d_name[0] >= '1' && entry->d_name[0] <= '9' && strcmp(entry->d_name, self))
				caught += look_at(entry->d_name);
		closedir(proc);
	}
	return 0;
}

/* A set of capabilities in a process's status. */
static unsigned long long capabilities(pid_t pid, const char *field)
{
	char path[64], line[256];
	unsigned long long set = 0;

	snprintf(path, sizeof path, "/proc/%d/status", pid);
	FILE *file = fopen(path, "r");
	while (file && fgets(line, sizeof line, file))
		if (!strncmp(line, field, strlen(field)))
			set = strtoull(line + strlen(field) + 1, NULL, 16);
	if (file)
		fclose(file);
	return set;
}

/* Seize each process as soon as it is born, and tell of one that can do what nobody in here may. */
static _Noreturn void trace(void)
{
	unsigned long long ours = capabilities(getpid(), "CapBnd");
	int status;

	puts("tracing");
	fflush(stdout);
	for (pid_t last = getpid(), pid = last;; pid = pid < last + 2 ? pid + 1 : last + 1) {
		if (pid == last || ptrace(PTRACE_SEIZE, pid, NULL, NULL) < 0)
			continue;
		ptrace(PTRACE_INTERRUPT, pid, NULL, NULL);
		waitpid(pid, &status, __WALL);
		int stronger = (capabilities(pid, "CapEff") & ~ours) != 0;
		printf("%s %d\n", stronger ? "stronger" : "equal", pid);
		fflush(stdout);
		ptrace(PTRACE_DETACH, pid, NULL, NULL);
		last = pid;
	}
}

/* Stop each process as soon as it is born. */
static _Noreturn void stop(void)
{
	puts("stopping");
	fflush(stdout);
	for (pid_t last = getpid(), pid = last;; pid = pid < last + 2 ? pid + 1 : last + 1)
		if (pid != last && kill(pid, SIGSTOP) == 0)
			last = pid;
}

static _Noreturn void *keep(void *unused)
{
	for (;;)
		pause();
}

/* A harmless leader, whom the kernel has all of /proc/PID tell about, beside a thread that keeps what it was given. */
static _Noreturn void behind(void)
{
	pthread_t thread;
	unsigned int header[2] = {0x20080522 /* _LINUX_CAPABILITY_VERSION_3 */, 0}, none[6] = {0};
	int number;

	if (pthread_create(&thread, NULL, keep, NULL))
		exit(1);
	for (number = 0; number < 64; number++)
		prctl(PR_CAPBSET_DROP, number, 0, 0, 0);
	syscall(SYS_capset, header, none);
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	puts("behind");
	fflush(stdout);
	keep(NULL);
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "swap"))
		swap(argv[2], argv[3]);
	if (argc == 3 && !strcmp(argv[1], "watch"))
		return watch(atoi(argv[2]));
	if (argc == 2 && !strcmp(argv[1], "trace"))
		trace();
	if (argc == 2 && !strcmp(argv[1], "stop"))
		stop();
	if (argc == 2 && !strcmp(argv[1], "euid"))
		return printf("euid %d\n", geteuid()) < 0;
	if (argc == 2 && !strcmp(argv[1], "behind"))
		behind();
	return 2;
}
