/* Preloaded: ends the process at one of its calls that change the file system for good.
 *
 * KILL_COUNT names a file that grows by a byte with every such call; KILL_AT is the number of the call, from 1, before
 * which the process ends (KILL_AFTER=1: after which). It ends as SIGKILL ends it: every thread at once, no buffer written,
 * no handler run. exit_group does the same for process 1 of a name space, which no signal from inside can kill.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static atomic_long calls;

static int count_and_tell(void) {
    const char *file = getenv("KILL_COUNT"), *at = getenv("KILL_AT");
    long call = atomic_fetch_add(&calls, 1) + 1;
    if (file != NULL) {
        int log = open(file, O_WRONLY | O_CREAT | O_APPEND, 0644);
        if (log >= 0) {
            (void)!write(log, ".", 1);
            close(log);
        }
    }
    return at != NULL && call == atol(at);
}

static void end(void) { syscall(SYS_exit_group, 137); }

#define CALL(result, name, parameters, ...)                               \
    result name parameters {                                              \
        static result(*real) parameters;                                  \
        if (real == NULL) real = dlsym(RTLD_NEXT, #name);                 \
        int now = count_and_tell(), after = getenv("KILL_AFTER") != NULL; \
        if (now && !after) end();                                         \
        result value = real(__VA_ARGS__);                                 \
        if (now && after) end();                                          \
        return value;                                                     \
    }

CALL(int, fsync, (int file), file)
CALL(int, fdatasync, (int file), file)
CALL(int, rename, (const char *from, const char *to), from, to)
CALL(int, renameat, (int a, const char *from, int b, const char *to), a, from, b, to)
CALL(int, renameat2, (int a, const char *from, int b, const char *to, unsigned flags), a, from, b, to, flags)
CALL(int, mkdir, (const char *path, mode_t mode), path, mode)
CALL(int, unlink, (const char *path), path)
CALL(int, link, (const char *from, const char *to), from, to)
CALL(int, linkat, (int a, const char *from, int b, const char *to, int flags), a, from, b, to, flags)
CALL(int, ftruncate64, (int file, off64_t size), file, size)
