//! RAPL: the energy counters of Intel and AMD processors, through the kernel's power-capping
//! interface (Documentation/power/powercap/powercap.rst).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::energy::{Component, EnergySource};
use crate::{MeterError, Quantity};

/// The energy of all processor packages of the machine, and of their memory where the processor
/// counts it.
///
/// Which zones are summed: every `package-*` of the control type `intel-rapl` (AMD processors
/// appear under the same name), and the `dram` zones listed below them, because the package
/// counter does not contain the memory's energy. What is left out, because a package's counter
/// contains it or it contains the package: `core`, `uncore`, `psys`, and the `intel-rapl-mmio`
/// view of the same counters.
///
/// The counters are the machine's: the work of other processes is in them.
#[derive(Debug)]
pub struct RaplSource {
    zones: Vec<Zone>,
    name: String,
    read: ReadFile,
}

type ReadFile = fn(&Path) -> io::Result<String>;

#[derive(Debug)]
struct Zone {
    counter: PathBuf,
    range_uj: u64,
    last_uj: u64,
    total_uj: u128,
}

impl RaplSource {
    /// Opens every package below `root` (`/sys/class/powercap`) and reads each counter once.
    ///
    /// # Errors
    ///
    /// Says whether the interface is missing, holds no package, may not be read (and the command
    /// that allows it) or holds something else than numbers.
    pub fn open(root: &Path) -> Result<RaplSource, MeterError> {
        RaplSource::open_with(root, |path| fs::read_to_string(path))
    }

    fn open_with(root: &Path, read: ReadFile) -> Result<RaplSource, MeterError> {
        let mut zones = Vec::new();
        let mut names = Vec::new();
        for (folder, name) in counted_zones(root, read)? {
            zones.push(Zone::open(&folder, read)?);
            names.push(name);
        }
        Ok(RaplSource {
            zones,
            name: format!("RAPL {}", names.join(" + ")),
            read,
        })
    }
}

impl EnergySource for RaplSource {
    fn component(&self) -> Component {
        Component::Host
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn energy_j(&mut self) -> Result<f64, MeterError> {
        let mut total_uj = 0;
        for zone in &mut self.zones {
            total_uj += zone.advance(self.read)?;
        }
        Ok(total_uj as f64 * 1e-6)
    }

    fn label(&self, energy_j: f64) -> Quantity {
        Quantity::measured(
            energy_j,
            format!("{} (whole machine, powercap counters)", self.name),
        )
    }

    fn counts_idle(&self) -> bool {
        true
    }
}

impl Zone {
    fn open(folder: &Path, read: ReadFile) -> Result<Zone, MeterError> {
        let counter = folder.join("energy_uj");
        let range_uj = read_number(&folder.join("max_energy_range_uj"), read)?;
        let last_uj = read_number(&counter, read)?;
        Ok(Zone {
            counter,
            range_uj,
            last_uj,
            total_uj: 0,
        })
    }

    /// Reads the counter and returns the microjoules since the zone was opened. The counter runs
    /// from 0 to `max_energy_range_uj` and then starts again at 0; one turn between two readings
    /// is undone here, and readings are frequent enough that there is never more than one.
    fn advance(&mut self, read: ReadFile) -> Result<u128, MeterError> {
        let now_uj = read_number(&self.counter, read)?;
        let grown_uj = if now_uj >= self.last_uj {
            now_uj - self.last_uj
        } else if self.last_uj <= self.range_uj {
            self.range_uj - self.last_uj + now_uj
        } else {
            return Err(MeterError::Malformed {
                path: self.counter.clone(),
                expected: "a counter within its own max_energy_range_uj",
            });
        };
        self.last_uj = now_uj;
        self.total_uj += u128::from(grown_uj);
        Ok(self.total_uj)
    }
}

/// The zones to sum, as (folder, name), sorted by folder name so that the order is stable.
fn counted_zones(root: &Path, read: ReadFile) -> Result<Vec<(PathBuf, String)>, MeterError> {
    let entries = fs::read_dir(root).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => MeterError::NoPowercap { path: root.into() },
        _ => unreadable(root, source),
    })?;
    let mut folders: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("intel-rapl:"))
        .collect();
    folders.sort();

    let mut named = Vec::new();
    for folder in folders {
        let name = read_text(&root.join(&folder).join("name"), read)?;
        named.push((folder, name.trim().to_owned()));
    }
    let packages: Vec<&str> = named
        .iter()
        .filter(|(folder, name)| is_top(folder) && name.starts_with("package"))
        .map(|(folder, _)| folder.as_str())
        .collect();
    if packages.is_empty() {
        return Err(MeterError::NoPackage { path: root.into() });
    }
    Ok(named
        .iter()
        .filter_map(|(folder, name)| {
            let parent = folder.rsplit_once(':').map_or("", |(parent, _)| parent);
            if packages.contains(&folder.as_str()) {
                Some((root.join(folder), name.clone()))
            } else if name == "dram" && packages.contains(&parent) {
                let number = parent.trim_start_matches("intel-rapl:");
                Some((root.join(folder), format!("dram-{number}")))
            } else {
                None
            }
        })
        .collect())
}

/// Whether a folder is a zone of its own (`intel-rapl:0`) rather than a part of one
/// (`intel-rapl:0:1`).
fn is_top(folder: &str) -> bool {
    folder.matches(':').count() == 1
}

fn read_number(path: &Path, read: ReadFile) -> Result<u64, MeterError> {
    read_text(path, read)?
        .trim()
        .parse()
        .map_err(|_| MeterError::Malformed {
            path: path.into(),
            expected: "a number of microjoules",
        })
}

fn read_text(path: &Path, read: ReadFile) -> Result<String, MeterError> {
    read(path).map_err(|source| unreadable(path, source))
}

fn unreadable(path: &Path, source: io::Error) -> MeterError {
    if source.kind() != io::ErrorKind::PermissionDenied {
        return MeterError::Read {
            path: path.into(),
            source,
        };
    }
    let root = path
        .ancestors()
        .find(|ancestor| ancestor.ends_with("powercap"))
        .unwrap_or(Path::new("/sys/class/powercap"));
    MeterError::PermissionDenied {
        path: path.into(),
        glob: root.join("intel-rapl*/energy_uj").display().to_string(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A powercap tree with one folder a zone, as `/sys/class/powercap` lists them.
    pub(crate) struct FakePowercap(tempfile::TempDir);

    impl FakePowercap {
        pub(crate) fn new(zones: &[(&str, &str)]) -> FakePowercap {
            let fake = FakePowercap(tempfile::tempdir().unwrap());
            fs::create_dir(fake.root()).unwrap();
            // The control type itself is listed beside its zones, and is not one of them.
            fs::create_dir(fake.root().join("intel-rapl")).unwrap();
            for (folder, name) in zones {
                let zone = fake.root().join(folder);
                fs::create_dir(&zone).unwrap();
                fs::write(zone.join("name"), format!("{name}\n")).unwrap();
                fs::write(zone.join("max_energy_range_uj"), "1000000\n").unwrap();
                fake.set(folder, 0);
            }
            fake
        }

        pub(crate) fn root(&self) -> PathBuf {
            self.0.path().join("powercap")
        }

        pub(crate) fn set(&self, folder: &str, energy_uj: u64) {
            let path = self.root().join(folder).join("energy_uj");
            fs::write(path, format!("{energy_uj}\n")).unwrap();
        }
    }

    #[test]
    fn packages_and_their_memory_are_summed_and_nothing_twice() {
        let fake = FakePowercap::new(&[
            ("intel-rapl:0", "package-0"),
            ("intel-rapl:0:0", "core"),
            ("intel-rapl:0:1", "uncore"),
            ("intel-rapl:0:2", "dram"),
            ("intel-rapl:1", "package-1"),
            ("intel-rapl:2", "psys"),
            ("intel-rapl:2:0", "dram"),
            ("intel-rapl-mmio:0", "package-0"),
        ]);
        let mut source = RaplSource::open(&fake.root()).unwrap();
        assert_eq!(source.name(), "RAPL package-0 + dram-0 + package-1");
        for (folder, energy_uj) in [
            ("intel-rapl:0", 400_000),
            ("intel-rapl:0:0", 300_000),
            ("intel-rapl:0:1", 50_000),
            ("intel-rapl:0:2", 30_000),
            ("intel-rapl:1", 200_000),
            ("intel-rapl:2", 900_000),
            ("intel-rapl:2:0", 30_000),
            ("intel-rapl-mmio:0", 400_000),
        ] {
            fake.set(folder, energy_uj);
        }
        let energy_j = source.energy_j().unwrap();
        assert!((energy_j - 0.63).abs() < 1e-12, "{energy_j}");
        assert_eq!(source.label(energy_j).status(), "measured");
        assert!(source.counts_idle());
    }

    #[test]
    fn a_counter_that_starts_again_is_unwrapped_each_time() {
        let fake = FakePowercap::new(&[("intel-rapl:0", "package-0")]);
        fake.set("intel-rapl:0", 900_000);
        let mut source = RaplSource::open(&fake.root()).unwrap();
        // 100,000 to the end of the range, then 50,000; then up to 950,000; then round again.
        for (counter_uj, expected_j) in [(50_000, 0.15), (950_000, 1.05), (10_000, 1.11)] {
            fake.set("intel-rapl:0", counter_uj);
            let energy_j = source.energy_j().unwrap();
            assert!(
                (energy_j - expected_j).abs() < 1e-12,
                "{energy_j} {expected_j}"
            );
        }
    }

    #[test]
    fn a_counter_beyond_its_range_cannot_be_unwrapped() {
        let fake = FakePowercap::new(&[("intel-rapl:0", "package-0")]);
        fake.set("intel-rapl:0", 2_000_000);
        let mut source = RaplSource::open(&fake.root()).unwrap();
        fake.set("intel-rapl:0", 5);
        assert!(matches!(
            source.energy_j(),
            Err(MeterError::Malformed { .. })
        ));
    }

    #[test]
    fn a_machine_without_the_interface_is_told_apart_from_one_without_packages() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("powercap");
        let error = RaplSource::open(&missing).unwrap_err();
        assert!(matches!(error, MeterError::NoPowercap { .. }), "{error}");
        assert!(error.to_string().contains("intel_rapl_msr"), "{error}");

        let fake = FakePowercap::new(&[("intel-rapl:0", "psys")]);
        let error = RaplSource::open(&fake.root()).unwrap_err();
        assert!(matches!(error, MeterError::NoPackage { .. }), "{error}");
    }

    #[test]
    fn a_forbidden_counter_says_how_to_allow_it() {
        let fake = FakePowercap::new(&[("intel-rapl:0", "package-0")]);
        // Injected rather than set on the file: root reads a file whatever its mode.
        let read: ReadFile = |path| {
            if path.ends_with("energy_uj") {
                Err(io::ErrorKind::PermissionDenied.into())
            } else {
                fs::read_to_string(path)
            }
        };
        let error = RaplSource::open_with(&fake.root(), read).unwrap_err();
        assert!(
            matches!(error, MeterError::PermissionDenied { .. }),
            "{error}"
        );
        let fix = format!(
            "sudo chmod a+r {}/intel-rapl*/energy_uj",
            fake.root().display()
        );
        assert!(error.to_string().contains(&fix), "{error}");
    }

    #[test]
    fn the_suggested_pattern_matches_only_counters_of_this_interface() {
        let path = Path::new("/sys/class/powercap/intel-rapl:0/energy_uj");
        let error = unreadable(path, io::ErrorKind::PermissionDenied.into()).to_string();
        assert!(
            error.ends_with("sudo chmod a+r /sys/class/powercap/intel-rapl*/energy_uj"),
            "{error}"
        );
    }

    #[test]
    fn a_counter_that_is_not_a_number_is_named() {
        let fake = FakePowercap::new(&[("intel-rapl:0", "package-0")]);
        fs::write(fake.root().join("intel-rapl:0/energy_uj"), "soon\n").unwrap();
        let error = RaplSource::open(&fake.root()).unwrap_err().to_string();
        assert!(error.contains("intel-rapl:0/energy_uj"), "{error}");
        assert!(error.contains("number of microjoules"), "{error}");
    }

    #[test]
    fn a_missing_range_makes_the_counter_unusable() {
        let fake = FakePowercap::new(&[("intel-rapl:0", "package-0")]);
        fs::remove_file(fake.root().join("intel-rapl:0/max_energy_range_uj")).unwrap();
        let error = RaplSource::open(&fake.root()).unwrap_err();
        assert!(matches!(error, MeterError::Read { .. }), "{error}");
        assert!(error.to_string().contains("max_energy_range_uj"));
    }
}
