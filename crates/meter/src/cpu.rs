//! Processor time of this process, and the energy model that rests on it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::energy::{Component, EnergySource};
use crate::{MeterError, Quantity};

/// The processor time of this process: user and system time of all its threads, ended ones
/// included, from `/proc/self/stat` (proc(5), fields 14 and 15). Its resolution is one clock
/// tick, 10 ms on Linux.
#[derive(Debug, Clone)]
pub struct CpuTime {
    stat: PathBuf,
    ticks_per_second: f64,
}

impl CpuTime {
    /// Reads below `proc_root` (`/proc`).
    pub fn open(proc_root: &Path) -> Result<CpuTime, MeterError> {
        let time = CpuTime {
            stat: proc_root.join("self/stat"),
            ticks_per_second: clock_ticks_per_second(proc_root),
        };
        time.seconds()?;
        Ok(time)
    }

    /// Processor seconds since the process began.
    pub fn seconds(&self) -> Result<f64, MeterError> {
        let text = fs::read_to_string(&self.stat).map_err(|source| MeterError::Read {
            path: self.stat.clone(),
            source,
        })?;
        let ticks = ticks_in(&text).ok_or_else(|| MeterError::Malformed {
            path: self.stat.clone(),
            expected: "the processor time of a process",
        })?;
        Ok(ticks as f64 / self.ticks_per_second)
    }
}

/// Energy as processor seconds of this process times a stated wattage: the last resort where no
/// counter can be read. It sees neither memory, nor disks, nor idle power, nor other processes.
#[derive(Debug, Clone)]
pub struct CpuTimeModel {
    time: CpuTime,
    watts_per_busy_core: f64,
    name: String,
}

impl CpuTimeModel {
    /// A model that charges `watts_per_busy_core` for each second of processor time.
    pub fn open(proc_root: &Path, watts_per_busy_core: f64) -> Result<CpuTimeModel, MeterError> {
        Ok(CpuTimeModel {
            time: CpuTime::open(proc_root)?,
            watts_per_busy_core,
            name: format!(
                "model: processor time of this process × {watts_per_busy_core} W a busy core"
            ),
        })
    }
}

impl EnergySource for CpuTimeModel {
    fn component(&self) -> Component {
        Component::Host
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn energy_j(&mut self) -> Result<f64, MeterError> {
        Ok(self.time.seconds()? * self.watts_per_busy_core)
    }

    fn label(&self, energy_j: f64) -> Quantity {
        Quantity::modelled(
            energy_j,
            &self.name,
            [
                ("cpu_time_s", energy_j / self.watts_per_busy_core),
                ("watts_per_busy_core", self.watts_per_busy_core),
            ],
        )
    }

    fn counts_idle(&self) -> bool {
        false
    }
}

/// User and system ticks in the text of `/proc/<pid>/stat`. The command name may hold spaces and
/// parentheses, so fields are counted from the last closing parenthesis.
fn ticks_in(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// Clock ticks a second, as the kernel told this process in its auxiliary vector (`AT_CLKTCK`,
/// getauxval(3)); 100, the constant of Linux's interface, where that cannot be read.
fn clock_ticks_per_second(proc_root: &Path) -> f64 {
    const AT_CLKTCK: usize = 17;
    const WORD: usize = size_of::<usize>();
    let vector = fs::read(proc_root.join("self/auxv")).unwrap_or_default();
    let word = |bytes: &[u8]| bytes.try_into().map(usize::from_ne_bytes).unwrap_or(0);
    vector
        .chunks_exact(2 * WORD)
        .find(|pair| word(&pair[..WORD]) == AT_CLKTCK)
        .map(|pair| word(&pair[WORD..]))
        .filter(|&ticks| ticks > 0)
        .map_or(100.0, |ticks| ticks as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "4242 (a name) with ) signs) R 1 1 1 0 -1 4194304 100 0 0 0 250 50 7 9 20 0 8 0 85237 3133440 360 18446744073709551615\n";

    fn fake_proc(stat: &str, auxv: &[usize]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let own = root.path().join("self");
        fs::create_dir(&own).unwrap();
        fs::write(own.join("stat"), stat).unwrap();
        let bytes: Vec<u8> = auxv.iter().flat_map(|word| word.to_ne_bytes()).collect();
        fs::write(own.join("auxv"), bytes).unwrap();
        root
    }

    #[test]
    fn fields_are_found_behind_an_awkward_name() {
        assert_eq!(ticks_in(STAT), Some(300));
        assert_eq!(ticks_in("4242 (short) R 1"), None);
        assert_eq!(ticks_in(""), None);
    }

    #[test]
    fn ticks_become_seconds_by_the_kernels_own_rate() {
        let root = fake_proc(STAT, &[6, 4096, 17, 200, 0, 0]);
        let time = CpuTime::open(root.path()).unwrap();
        assert_eq!(time.seconds().unwrap(), 1.5);
        let root = fake_proc(STAT, &[0, 0]);
        assert_eq!(CpuTime::open(root.path()).unwrap().seconds().unwrap(), 3.0);
    }

    #[test]
    fn the_model_is_time_times_watts_and_says_so() {
        let root = fake_proc(STAT, &[17, 100]);
        let mut model = CpuTimeModel::open(root.path(), 12.5).unwrap();
        let energy_j = model.energy_j().unwrap();
        assert_eq!(energy_j, 37.5);
        let Quantity::Modelled { inputs, source, .. } = model.label(energy_j) else {
            panic!("the model's energy must be labelled as modelled");
        };
        assert_eq!(inputs["cpu_time_s"], 3.0);
        assert_eq!(inputs["watts_per_busy_core"], 12.5);
        assert!(source.contains("12.5 W a busy core"));
    }

    #[test]
    fn a_missing_or_strange_file_is_named() {
        let root = tempfile::tempdir().unwrap();
        let error = CpuTime::open(root.path()).unwrap_err().to_string();
        assert!(error.contains("self/stat"), "{error}");
        let root = fake_proc("nothing of the kind", &[]);
        let error = CpuTime::open(root.path()).unwrap_err();
        assert!(matches!(error, MeterError::Malformed { .. }));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_time_of_this_process_grows_with_its_work() {
        let time = CpuTime::open(Path::new("/proc")).unwrap();
        let before = time.seconds().unwrap();
        let started = std::time::Instant::now();
        let mut state = 1_u64;
        while time.seconds().unwrap() - before < 0.05 {
            for _ in 0..10_000 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
            }
            std::hint::black_box(state);
            assert!(
                started.elapsed().as_secs() < 60,
                "the counter does not move"
            );
        }
    }
}
