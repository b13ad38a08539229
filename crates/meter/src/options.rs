//! What a recipe may say about measuring, and which device a run uses.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::MeterError;

/// The `[energy]` section of a recipe. Every key has a default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EnergyOptions {
    /// Seconds for which the machine is watched at rest before the run, for net energy. 0 leaves
    /// the baseline out; net energy is then unavailable. Default 2.
    pub idle_window_s: f64,
    /// Watts charged for each second of processor time where no counter can be read. Default 10:
    /// a round figure between about 4 (a server's thermal design power over its cores) and 15
    /// (a desktop's). State your own when you know it.
    pub watts_per_busy_core: f64,
    /// Grams of CO₂ equivalent a kilowatt-hour of the local grid; without it no emissions are
    /// given.
    pub grid_intensity_g_per_kwh: Option<f64>,
    /// Seconds between background readings. They keep a RAPL counter from wrapping round unseen
    /// and feed the live watts. Default 1.
    pub sample_interval_s: f64,
    /// Where the kernel shows RAPL; not a recipe key.
    #[serde(skip)]
    pub powercap_root: PathBuf,
    /// Where the kernel shows processes; not a recipe key.
    #[serde(skip)]
    pub proc_root: PathBuf,
}

impl Default for EnergyOptions {
    fn default() -> EnergyOptions {
        EnergyOptions {
            idle_window_s: 2.0,
            watts_per_busy_core: 10.0,
            grid_intensity_g_per_kwh: None,
            sample_interval_s: 1.0,
            powercap_root: PathBuf::from("/sys/class/powercap"),
            proc_root: PathBuf::from("/proc"),
        }
    }
}

impl EnergyOptions {
    /// Refuses numbers that mean nothing, naming the key.
    pub fn check(&self) -> Result<(), MeterError> {
        let refuse = |key, reason: &str| {
            Err(MeterError::InvalidOption {
                key,
                reason: reason.to_owned(),
            })
        };
        if !(self.idle_window_s >= 0.0 && self.idle_window_s <= 600.0) {
            return refuse("idle_window_s", "must be from 0 to 600 seconds");
        }
        if !(self.watts_per_busy_core > 0.0 && self.watts_per_busy_core <= 1000.0) {
            return refuse(
                "watts_per_busy_core",
                "must be above 0 and at most 1000 watts",
            );
        }
        if !(self.sample_interval_s >= 0.05 && self.sample_interval_s <= 60.0) {
            return refuse("sample_interval_s", "must be from 0.05 to 60 seconds");
        }
        match self.grid_intensity_g_per_kwh {
            Some(intensity) if !(0.0..=5000.0).contains(&intensity) => refuse(
                "grid_intensity_g_per_kwh",
                "must be from 0 to 5000 grams a kilowatt-hour",
            ),
            _ => Ok(()),
        }
    }

    pub(crate) fn idle_window(&self) -> Duration {
        Duration::from_secs_f64(self.idle_window_s)
    }

    pub(crate) fn sample_interval(&self) -> Duration {
        Duration::from_secs_f64(self.sample_interval_s)
    }
}

/// The device whose energy and memory a run counts, besides the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MeteredDevice {
    /// The host's processors: no second component.
    Cpu,
    /// The CUDA device with this ordinal, as the process sees it (after `CUDA_VISIBLE_DEVICES`).
    Cuda { ordinal: usize },
    /// A graphics adapter by the name its driver gives. Metered through NVML when exactly one of
    /// NVML's GPUs has that name; a software renderer counts as the host.
    Adapter { name: String },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_round_trip() {
        let options = EnergyOptions::default();
        options.check().unwrap();
        let json = serde_json::to_value(&options).unwrap();
        assert!(json.get("powercap_root").is_none());
        let back: EnergyOptions = serde_json::from_value(json).unwrap();
        assert_eq!(back.watts_per_busy_core, options.watts_per_busy_core);
    }

    #[test]
    fn the_skipped_paths_keep_their_defaults() {
        let options: EnergyOptions = serde_json::from_str(r#"{"idle_window_s": 0.5}"#).unwrap();
        assert_eq!(options.powercap_root, PathBuf::from("/sys/class/powercap"));
        assert_eq!(options.proc_root, PathBuf::from("/proc"));
        assert_eq!(options.idle_window_s, 0.5);
    }

    #[test]
    fn an_unknown_key_is_refused() {
        let error = serde_json::from_str::<EnergyOptions>(r#"{"watts": 5}"#).unwrap_err();
        assert!(error.to_string().contains("watts"));
    }

    #[test]
    fn numbers_without_meaning_are_refused_by_name() {
        type Change = fn(&mut EnergyOptions);
        let cases: [(&str, Change); 5] = [
            ("idle_window_s", |o| o.idle_window_s = -1.0),
            ("idle_window_s", |o| o.idle_window_s = f64::NAN),
            ("watts_per_busy_core", |o| o.watts_per_busy_core = 0.0),
            ("sample_interval_s", |o| o.sample_interval_s = 0.0),
            ("grid_intensity_g_per_kwh", |o| {
                o.grid_intensity_g_per_kwh = Some(f64::NAN);
            }),
        ];
        for (key, change) in cases {
            let mut options = EnergyOptions::default();
            change(&mut options);
            let error = options.check().unwrap_err().to_string();
            assert!(error.starts_with(&format!("`{key}`")), "{error}");
        }
    }
}
