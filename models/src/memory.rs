//! How much memory there is, so that what a file asks for can be refused instead of ending the process.

use std::{fs, path::Path, sync::OnceLock};

use crate::{DeviceFault, Error, Result};

/// What the operator lets a model take.
static LIMIT: OnceLock<u64> = OnceLock::new();

/// From now on no model takes more than so many bytes, however many there are; the first call counts.
pub fn limit(bytes: u64) {
    let _ = LIMIT.set(bytes);
}

/// Refuses a model that would take more than [`limit`] allows, `total` bytes in all, or than there is, `more` bytes
/// besides what it has: `field` asks for that.
///
/// # Errors
/// [`Error::Value`] naming field, value, need, what there is, and the remedy.
pub fn check(
    field: impl Into<String>,
    value: impl ToString,
    [total, more]: [u64; 2],
    remedy: &str,
) -> Result<()> {
    let gigabytes = |bytes: u64| format!("{:.2} GB", bytes as f64 / 1e9);
    let problem = match (LIMIT.get(), available()) {
        (Some(&limit), _) if total > limit => {
            format!("takes {}, --max-model-bytes allows {}", gigabytes(total), gigabytes(limit))
        }
        (_, Some(there)) if more > there => {
            format!("takes {}, {} of memory are free", gigabytes(more), gigabytes(there))
        }
        _ => return Ok(()),
    };
    Err(Error::value(field, value, format!("{problem}; {remedy}")))
}

/// Refuses more than there is, so that whoever asked tries fewer rows.
///
/// # Errors
/// [`DeviceFault::OutOfMemory`].
pub fn admit(bytes: u64) -> candle_core::Result<()> {
    match available() {
        Some(there) if bytes > there => Err(DeviceFault::OutOfMemory(format!(
            "takes {bytes} bytes, {there} are free; take fewer at once"
        ))
        .into()),
        _ => Ok(()),
    }
}

/// Bytes that this process may still take: the least of what the machine has free, what its control groups and its
/// limits leave, but for an eighth, which is others'. Nothing where the system does not tell.
pub fn available() -> Option<u64> {
    let machine =
        fs::read_to_string("/proc/meminfo").ok().and_then(|text| kilobytes(&text, "MemAvailable:"));
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let under = |limit: &str, used: &str| {
        Some(soft(&limits, limit)?.saturating_sub(kilobytes(&status, used)?))
    };
    let all = [
        machine,
        group(),
        under("Max address space", "VmSize:"),
        under("Max data size", "VmData:"),
    ];
    all.into_iter().flatten().min().map(|bytes| bytes - bytes / 8)
}

/// The most memory that this process has had so far, in bytes. Nothing where the system does not tell.
pub fn peak() -> Option<u64> {
    kilobytes(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// The value of a line such as `MemAvailable:  123 kB`, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The soft limit of a line such as `Max address space   3221225472   unlimited   bytes`.
fn soft(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// What the control groups leave, of version 2 or 1, from this process's own up to the root's.
fn group() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let left = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let (root, names) = match controllers {
            "" => ("/sys/fs/cgroup", ["memory.max", "memory.current", "inactive_file"]),
            _ if controllers.split(',').any(|one| one == "memory") => (
                "/sys/fs/cgroup/memory",
                ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"],
            ),
            _ => return None,
        };
        let ancestors = Path::new(path).ancestors();
        let folders =
            ancestors.map(|path| Path::new(root).join(path.strip_prefix("/").unwrap_or(path)));
        folders.filter_map(|folder| left(&folder, names)).min()
    });
    left.min()
}

fn left(folder: &Path, [most, used, inactive]: [&str; 3]) -> Option<u64> {
    let number =
        |name: &str| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    let (most, used) = (number(most)?, number(used)?);
    // Files that are only cached give way.
    let statistics = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let cached =
        statistics.lines().find_map(|line| line.strip_prefix(inactive)?.trim().parse().ok());
    Some(most.saturating_sub(used.saturating_sub(cached.unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc_are_read() {
        assert_eq!(
            kilobytes("MemFree: 1 kB\nMemAvailable:   12 kB\n", "MemAvailable:"),
            Some(12_288)
        );
        let limits = "Max data size     unlimited  unlimited  bytes\nMax address space  3221225472  unlimited  bytes\n";
        assert_eq!(soft(limits, "Max address space"), Some(3 << 30));
        assert_eq!(soft(limits, "Max data size"), None);
        if cfg!(target_os = "linux") {
            assert!(available().is_some_and(|bytes| bytes > 0 && bytes < 1 << 50));
        }
    }

    #[test]
    fn what_nothing_could_hold_is_refused_by_field() {
        assert!(check("x.json: side", 3, [1, 1], "make it smaller").is_ok());
        if cfg!(target_os = "linux") {
            let problem =
                check("x.json: side", 3, [0, 1 << 60], "make it smaller").unwrap_err().to_string();
            assert!(problem.contains("`x.json: side` is 3: takes 1152921504.61 GB"), "{problem}");
            assert!(problem.contains("free; make it smaller"), "{problem}");
            let fault = DeviceFault::of(&admit(1 << 60).unwrap_err());
            assert!(matches!(fault, DeviceFault::OutOfMemory(_)), "{fault:?}");
        }
    }
}
