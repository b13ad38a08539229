//! What the host has left for this process.

use std::fs;
use std::path::Path;

use crate::{MeterError, Quantity, describe};

/// Limits of control groups, of both versions.
const LIMITS: [&str; 2] = ["memory.max", "memory/memory.limit_in_bytes"];

/// The resident memory of this process, in bytes: `VmRSS` of `/proc/self/status` (proc(5)).
/// `proc_root` is `/proc`.
pub fn resident_host_memory(proc_root: &Path) -> Quantity {
    kibibytes(&proc_root.join("self/status"), "VmRSS:", "VmRSS, kernel")
}

/// The most resident memory this process can have, in bytes: what it has and what is available
/// (`MemAvailable`), or the limit of its control group where that is lower. `proc_root` is `/proc`,
/// `cgroup_root` `/sys/fs/cgroup`.
pub fn host_memory_limit(proc_root: &Path, cgroup_root: &Path) -> Quantity {
    let source = "MemAvailable, kernel";
    let available = kibibytes(&proc_root.join("meminfo"), "MemAvailable:", source);
    let resident = resident_host_memory(proc_root);
    let (Some(available_bytes), Some(resident)) = (available.value(), resident.value()) else {
        return match available.value() {
            None => available,
            Some(_) => resident,
        };
    };
    let free = available_bytes + resident;
    let limits = LIMITS.iter().filter_map(|name| {
        let text = fs::read_to_string(cgroup_root.join(name)).ok()?;
        text.trim().parse::<u64>().ok()
    });
    match limits.min() {
        Some(limit) if (limit as f64) < free => {
            Quantity::measured(limit as f64, "limit of the control group")
        }
        _ => Quantity::measured(free, "MemAvailable and VmRSS, kernel"),
    }
}

/// The number of kB behind `name` in a file of the kernel's, in bytes.
fn kibibytes(path: &Path, name: &str, source: &str) -> Quantity {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(source) => {
            let path = path.to_owned();
            return Quantity::unavailable(describe(&MeterError::Read { path, source }));
        }
    };
    let found = text.lines().find_map(|line| line.strip_prefix(name));
    let number = found.and_then(|text| text.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    match number {
        Some(number) => Quantity::measured((number * 1024) as f64, source),
        None => Quantity::unavailable(format!("{} has no {name} in kB", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(available_kb: u64, resident_kb: u64, limit: Option<&str>) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write(
            "meminfo",
            format!("MemTotal: 99 kB\nMemAvailable:   {available_kb} kB\n"),
        );
        write(
            "self/status",
            format!("VmHWM: 999 kB\nVmRSS:\t{resident_kb} kB\n"),
        );
        if let Some(limit) = limit {
            write("memory.max", format!("{limit}\n"));
        }
        root
    }

    #[test]
    fn the_lower_of_free_memory_and_limit_counts() {
        for (limit, expected) in [
            (None, 300.0 * 1024.0),
            (Some("max"), 300.0 * 1024.0),
            (Some("1000000000"), 300.0 * 1024.0),
            (Some("2048"), 2048.0),
        ] {
            let root = root(200, 100, limit);
            let found = host_memory_limit(root.path(), root.path());
            assert_eq!(found.value(), Some(expected), "{limit:?}");
        }
        let root = root(1, 7, None);
        assert_eq!(
            resident_host_memory(root.path()).value(),
            Some(7.0 * 1024.0)
        );
        let nowhere = host_memory_limit(Path::new("/nonexistent"), Path::new("/nonexistent"));
        assert!(
            nowhere.source().contains("/nonexistent/meminfo"),
            "{nowhere:?}"
        );
    }
}
