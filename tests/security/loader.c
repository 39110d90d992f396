/* An image's "dynamic linker": the kernel hands it the process when a program of the host is executed inside.  It
   opens that program by /proc/self/exe and leaves the descriptor to a script that waits until it can be written. */

#define OPEN 2
#define EXECVE 59
#define EXIT 60

static long call(long number, const void *a, const void *b, const void *c)
{
	long result;
	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
	return result;
}

void _start(void)
{
	static const char *argv[] = {"sh", "/hold", 0}, *envp[] = {"PATH=/bin", 0};

	call(OPEN, "/proc/self/exe", 0, 0);
	call(EXECVE, "/bin/busybox", argv, envp);
	call(EXIT, (void *)1, 0, 0);
}
