//! The meter of a run: one object that the training loop tells what happens.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::clock::{Clock, SystemClock};
use crate::energy::{Channel, EnergyMeter, Purpose};
use crate::flops::{FlopModel, PeakFlops};
use crate::memory::{DEVICE_IS_HOST, DeviceMemory};
use crate::nvml::{NvmlApi, SystemNvml};
use crate::options::{EnergyOptions, MeteredDevice};
use crate::report::{ActivityEnergy, EnergyReport, IdleBaseline, MeterReport, UtilisationReport};
use crate::sources::{device_channel, gpu_of, host_channel};
use crate::throughput::{ActivityThroughput, Counts, Phase, StepLog, ThroughputReport};
use crate::{MeterError, Quantity, describe};

/// Measures a run: time, tokens, operations, memory and energy, in windows of one purpose each.
///
/// The caller synchronises the device before [`begin`](Meter::begin) and [`end`](Meter::end);
/// work that the device has not finished would be counted in the wrong window otherwise.
pub struct Meter {
    options: EnergyOptions,
    clock: Arc<dyn Clock>,
    energy: EnergyMeter,
    memory: DeviceMemory,
    notes: Vec<String>,
    open: Option<(Purpose, f64)>,
    elapsed_s: [f64; 3],
    counts: [Counts; 3],
    flop_model: Option<FlopModel>,
    peak: Option<PeakFlops>,
    training_flops: f64,
    recomputed_flops: f64,
    log: StepLog,
    step: StepSoFar,
    recent_steps: VecDeque<(f64, Counts)>,
}

/// What the step under way has gathered.
#[derive(Default)]
struct StepSoFar {
    started_s: f64,
    counts: Counts,
    phases_s: [f64; 5],
}

/// One finished optimizer step, for `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepReading {
    pub elapsed_s: f64,
    pub data_s: f64,
    pub forward_s: f64,
    pub backward_s: f64,
    pub optimizer_s: f64,
    pub counts: Counts,
    /// Of this step alone; `None` if the clock did not move.
    pub padded_tokens_per_s: Option<f64>,
    pub tokens_per_s: Option<f64>,
    pub supervised_per_s: Option<f64>,
}

/// The present speed and power, for a progress line.
#[derive(Debug, Clone, PartialEq)]
pub struct Live {
    /// Real tokens a second over the last steps.
    pub tokens_per_s: Option<f64>,
    /// Watts of the last seconds, all counted components together.
    pub watts: Quantity,
}

/// Steps that the live speed is averaged over.
const RECENT_STEPS: usize = 20;

impl Meter {
    /// Opens every energy source that the run on `device` can use. A source that cannot be read
    /// is no error: the report says why. Fails on options that mean nothing.
    pub fn open(options: &EnergyOptions, device: &MeteredDevice) -> Result<Meter, MeterError> {
        Meter::open_with(options, device, || {
            SystemNvml::load().map(|nvml| Arc::new(nvml) as Arc<dyn NvmlApi>)
        })
    }

    /// [`open`](Meter::open), with NVML given.
    pub fn open_with(
        options: &EnergyOptions,
        device: &MeteredDevice,
        load_nvml: impl FnOnce() -> Result<Arc<dyn NvmlApi>, MeterError>,
    ) -> Result<Meter, MeterError> {
        options.check()?;
        let mut notes = Vec::new();
        let mut channels = vec![host_channel(options, &mut notes)];
        let gpu = gpu_of(device, load_nvml);
        channels.extend(device_channel(&gpu));
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let interval = options.sample_interval();
        let energy = EnergyMeter::new(channels, clock.clone(), Some(interval));
        let gpu = gpu.map_err(|error| match error {
            None => DEVICE_IS_HOST.to_owned(),
            Some(error) => describe(&error),
        });
        Ok(Meter::assemble(
            options.clone(),
            clock,
            energy,
            DeviceMemory::new(gpu),
            notes,
        ))
    }

    /// A meter of the given sources and clock, without a background thread.
    pub fn with_channels(
        options: &EnergyOptions,
        channels: Vec<Channel>,
        clock: Arc<dyn Clock>,
    ) -> Result<Meter, MeterError> {
        options.check()?;
        let energy = EnergyMeter::new(channels, clock.clone(), None);
        let memory = DeviceMemory::new(Err("no GPU was given".to_owned()));
        Ok(Meter::assemble(
            options.clone(),
            clock,
            energy,
            memory,
            Vec::new(),
        ))
    }

    fn assemble(
        options: EnergyOptions,
        clock: Arc<dyn Clock>,
        energy: EnergyMeter,
        memory: DeviceMemory,
        notes: Vec<String>,
    ) -> Meter {
        let step = StepSoFar {
            started_s: clock.now_s(),
            ..StepSoFar::default()
        };
        Meter {
            options,
            clock,
            energy,
            memory,
            notes,
            open: None,
            elapsed_s: [0.0; 3],
            counts: [Counts::default(); 3],
            flop_model: None,
            peak: None,
            training_flops: 0.0,
            recomputed_flops: 0.0,
            log: StepLog::default(),
            step,
            recent_steps: VecDeque::new(),
        }
    }

    /// What a token costs; set it before the first step. Without it there is no utilisation.
    pub fn set_flop_model(&mut self, model: FlopModel) {
        self.flop_model = Some(model);
    }

    /// What the device could do at most. Without it there is no utilisation.
    pub fn set_peak(&mut self, peak: PeakFlops) {
        self.peak = Some(peak);
    }

    /// Something that a reader of the report has to know.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Watches the machine at rest for the options' idle window. Blocks that long; call it with
    /// nothing of the run at work, before the first window.
    pub fn measure_idle(&mut self) {
        let window = self.options.idle_window();
        self.energy.measure_idle(window);
    }

    /// Opens a window; one that is open ends there. The caller has synchronised the device.
    pub fn begin(&mut self, purpose: Purpose) {
        self.energy.begin(purpose);
        let now_s = self.close_time();
        self.open = Some((purpose, now_s));
        if purpose == Purpose::Training {
            self.step = StepSoFar {
                started_s: now_s,
                ..StepSoFar::default()
            };
        }
    }

    /// Ends the open window, if there is one. The caller has synchronised the device.
    pub fn end(&mut self) {
        self.energy.end();
        self.close_time();
        self.open = None;
        self.memory.sample(self.clock.now_s());
    }

    /// Joules of the window that ended last, all components together.
    pub fn last_window_j(&self) -> Quantity {
        self.energy.last_j()
    }

    /// Runs `work` in a window of its own, with `synchronise` before and after it, and goes back
    /// to the window that was open.
    pub fn within<T>(
        &mut self,
        purpose: Purpose,
        synchronise: impl Fn(),
        work: impl FnOnce(&mut Meter) -> T,
    ) -> T {
        let outer = self.open.map(|(purpose, _)| purpose);
        synchronise();
        self.begin(purpose);
        let result = work(self);
        synchronise();
        match outer {
            Some(outer) => self.begin(outer),
            None => self.end(),
        }
        result
    }

    /// Adds what a batch held. `segment_lengths` are the lengths of its real sequences, in tokens;
    /// their operations count towards the utilisation when `purpose` is training.
    pub fn count(&mut self, purpose: Purpose, counts: Counts, segment_lengths: &[usize]) {
        self.counts[purpose.index()] += counts;
        if purpose != Purpose::Training {
            return;
        }
        self.step.counts += counts;
        if let Some(model) = &self.flop_model {
            for &length in segment_lengths {
                self.training_flops += model.training_flops(length);
                self.recomputed_flops += model.recomputed_flops(length);
            }
        }
    }

    /// Runs `work` and adds its wall time to a phase.
    pub fn time<T>(&mut self, phase: Phase, work: impl FnOnce() -> T) -> T {
        let started_s = self.clock.now_s();
        let result = work();
        self.add_phase(phase, self.clock.now_s() - started_s);
        result
    }

    /// Adds seconds that the caller measured to a phase.
    pub fn add_phase(&mut self, phase: Phase, seconds: f64) {
        // Totals are shares of training and evaluation; warming up is neither.
        if !matches!(self.open, Some((Purpose::WarmUp, _))) {
            self.log.add_phase(phase, seconds);
        }
        self.step.phases_s[phase as usize] += seconds;
    }

    /// Ends an optimizer step: its time runs from the end of the step before, or from the
    /// beginning of the window.
    pub fn finish_step(&mut self) -> StepReading {
        let now_s = self.clock.now_s();
        let step = std::mem::replace(
            &mut self.step,
            StepSoFar {
                started_s: now_s,
                ..StepSoFar::default()
            },
        );
        let elapsed_s = now_s - step.started_s;
        self.log.add_step(elapsed_s);
        self.memory.sample(now_s);
        if self.recent_steps.len() == RECENT_STEPS {
            self.recent_steps.pop_front();
        }
        self.recent_steps.push_back((elapsed_s, step.counts));
        let rate = |count: u64| (elapsed_s > 0.0).then(|| count as f64 / elapsed_s);
        let phase_s = |phase: Phase| step.phases_s[phase as usize];
        StepReading {
            elapsed_s,
            data_s: phase_s(Phase::Data),
            forward_s: phase_s(Phase::Forward),
            backward_s: phase_s(Phase::Backward),
            optimizer_s: phase_s(Phase::Optimizer),
            counts: step.counts,
            padded_tokens_per_s: rate(step.counts.padded_tokens),
            tokens_per_s: rate(step.counts.tokens),
            supervised_per_s: rate(step.counts.supervised),
        }
    }

    /// The present speed and power.
    pub fn live(&self) -> Live {
        let elapsed_s: f64 = self.recent_steps.iter().map(|(seconds, _)| seconds).sum();
        let tokens: u64 = self
            .recent_steps
            .iter()
            .map(|(_, counts)| counts.tokens)
            .sum();
        Live {
            tokens_per_s: (elapsed_s > 0.0).then(|| tokens as f64 / elapsed_s),
            watts: self.energy.live_watts(),
        }
    }

    /// Keeps the most device memory that the backend says it held.
    pub fn record_device_peak(&mut self, bytes: u64, source: &str) {
        self.memory.state(bytes, source);
    }

    /// The names of the energy sources in use.
    pub fn source_names(&self) -> Vec<String> {
        self.energy.source_names()
    }

    /// Everything measured in windows that have ended. An open window is not in it.
    pub fn report(&self) -> MeterReport {
        let [_, training_s, evaluation_s] = self.elapsed_s;
        let throughput = |purpose: Purpose| {
            let index = purpose.index();
            ActivityThroughput::new(purpose, self.counts[index], self.elapsed_s[index])
        };
        MeterReport {
            throughput: ThroughputReport {
                warm_up: throughput(Purpose::WarmUp),
                training: throughput(Purpose::Training),
                evaluation: throughput(Purpose::Evaluation),
                steps: self.log.step_times(),
                phases: self.log.phases(training_s, evaluation_s),
                other_s: self.log.other_s(training_s),
            },
            utilisation: self.utilisation(training_s),
            memory: self.memory.report(&self.options.proc_root),
            energy: self.energy_report(),
        }
    }

    /// Adds the time of the open window to its purpose and returns the present time.
    fn close_time(&mut self) -> f64 {
        let now_s = self.clock.now_s();
        if let Some((purpose, opened_s)) = self.open {
            self.elapsed_s[purpose.index()] += now_s - opened_s;
        }
        now_s
    }

    fn utilisation(&self, training_s: f64) -> UtilisationReport {
        let none = |reason: &str| UtilisationReport {
            model_flops: Quantity::unavailable(reason),
            mfu: Quantity::unavailable(reason),
            hfu: Quantity::unavailable(reason),
        };
        let Some(model) = &self.flop_model else {
            return none("the model's operations were not given");
        };
        if training_s <= 0.0 || self.training_flops <= 0.0 {
            return none("no training was measured");
        }
        let attention = if model.causal { 6 } else { 12 };
        let base = if model.base_trained { 6 } else { 4 };
        let how = format!(
            "({base}·N + 6·P + {attention}·S·d·L) a token over real segments, N = {}, P = {}, d = {}, L = {}",
            model.base_parameters, model.adapter_parameters, model.attention_width, model.layers
        );
        let inputs = [
            ("base_parameters", model.base_parameters as f64),
            ("adapter_parameters", model.adapter_parameters as f64),
            ("attention_width", model.attention_width as f64),
            ("layers", model.layers as f64),
        ];
        let utilisation = |flops: f64| match &self.peak {
            None => {
                Quantity::unavailable("the device's peak FLOP/s is neither stated nor measured")
            }
            Some(peak) => Quantity::modelled(
                flops / training_s / peak.flops_per_s(),
                format!("{how}; {}", peak.describe()),
                inputs.into_iter().chain([
                    ("flops", flops),
                    ("elapsed_s", training_s),
                    ("peak_flops_per_s", peak.flops_per_s()),
                ]),
            ),
        };
        UtilisationReport {
            model_flops: Quantity::modelled(self.training_flops, &how, inputs),
            mfu: utilisation(self.training_flops),
            hfu: utilisation(self.training_flops + self.recomputed_flops),
        }
    }

    fn energy_report(&self) -> EnergyReport {
        let (readings, idle_window_s) = self.energy.components();
        let grid = match self.options.grid_intensity_g_per_kwh {
            Some(intensity) => Quantity::modelled(intensity, "stated in the recipe", []),
            None => Quantity::unavailable("no grid intensity was given"),
        };
        let activity = |purpose: Purpose| {
            let index = purpose.index();
            ActivityEnergy::new(
                purpose,
                &readings,
                self.counts[index],
                self.elapsed_s[index],
                &grid,
            )
        };
        EnergyReport {
            idle: IdleBaseline {
                window_s: match idle_window_s {
                    Some(seconds) => Quantity::measured(seconds, "monotonic clock"),
                    None => Quantity::unavailable("the idle baseline was not measured"),
                },
                watts: Quantity::sum(
                    readings
                        .iter()
                        .map(|reading| (reading.component.name(), &reading.idle_w)),
                ),
            },
            warm_up: activity(Purpose::WarmUp),
            training: activity(Purpose::Training),
            evaluation: activity(Purpose::Evaluation),
            grid_intensity_g_per_kwh: grid,
            notes: self.notes.clone(),
        }
    }
}

#[cfg(test)]
mod tests;
