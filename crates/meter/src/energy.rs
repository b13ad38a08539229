//! Energy sources, and the meter that reads them at the ends of windows and in between.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::Clock;
use crate::{MeterError, Quantity, describe};

/// Which part of the machine a source measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Component {
    /// Processors, and their memory where it is counted.
    Host,
    /// The accelerator that the run uses.
    Device,
}

impl Component {
    pub fn name(self) -> &'static str {
        match self {
            Component::Host => "host",
            Component::Device => "device",
        }
    }
}

/// Something that counts joules.
pub trait EnergySource: Send {
    /// The part of the machine that is counted.
    fn component(&self) -> Component;

    /// What is read, for the report: the counter and the hardware.
    fn name(&self) -> &str;

    /// Joules since the source was opened. It never shrinks: a source undoes its counter's
    /// wrap-around itself.
    fn energy_j(&mut self) -> Result<f64, MeterError>;

    /// `energy_j` as a [`Quantity`] that says whether it is measured or modelled.
    fn label(&self, energy_j: f64) -> Quantity;

    /// Whether the source also counts what the hardware draws at rest. Where it does not (a model
    /// of busy time), gross and net energy are the same by definition.
    fn counts_idle(&self) -> bool;
}

/// What a window of the run is for. Their energy, time and tokens are kept apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Compiling and tuning kernels before the first step that counts.
    WarmUp,
    Training,
    Evaluation,
}

impl Purpose {
    pub const ALL: [Purpose; 3] = [Purpose::WarmUp, Purpose::Training, Purpose::Evaluation];

    pub fn name(self) -> &'static str {
        match self {
            Purpose::WarmUp => "warm_up",
            Purpose::Training => "training",
            Purpose::Evaluation => "evaluation",
        }
    }

    pub(crate) fn index(self) -> usize {
        self as usize
    }
}

/// A component that ought to be counted: its source, or why there is none.
pub enum Channel {
    Source(Box<dyn EnergySource>),
    Missing {
        component: Component,
        reason: String,
    },
}

/// Reads the energy sources in windows, and in the background so that no counter wraps round
/// unseen and the present watts are known.
pub struct EnergyMeter {
    shared: Arc<Shared>,
    clock: Arc<dyn Clock>,
    sampler: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    stop: AtomicBool,
}

struct State {
    counters: Vec<Counter>,
    open: Option<Purpose>,
    idle_window_s: Option<f64>,
}

/// One component's accumulated readings.
struct Counter {
    channel: Channel,
    /// Joules at the opening of the present window, or why they could not be read.
    opened_j: Result<f64, String>,
    /// Joules a purpose, or why they are not complete.
    spent_j: [Result<f64, String>; 3],
    /// Joules of the window that ended last.
    last_j: Result<f64, String>,
    windows: [u64; 3],
    idle_w: Result<f64, String>,
    /// Recent (seconds, joules), for the present watts.
    recent: VecDeque<(f64, f64)>,
}

/// What the meter knows of one component.
#[derive(Debug, Clone)]
pub(crate) struct ComponentReading {
    pub component: Component,
    /// The source's name, or `none`.
    pub source: String,
    pub idle_w: Quantity,
    /// Gross joules and the idle watts to take off, a purpose.
    pub gross_j: [Quantity; 3],
    pub windows: [u64; 3],
}

/// The present watts are averaged over readings up to this old.
const RECENT_S: f64 = 3.0;
/// Readings closer than this say more of the counter's steps than of the power.
const SHORTEST_S: f64 = 0.25;

impl EnergyMeter {
    /// A meter of `channels`. With a `sample_interval`, a background thread reads them that often
    /// until the meter is dropped.
    pub fn new(
        channels: Vec<Channel>,
        clock: Arc<dyn Clock>,
        sample_interval: Option<Duration>,
    ) -> EnergyMeter {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                counters: channels.into_iter().map(Counter::new).collect(),
                open: None,
                idle_window_s: None,
            }),
            stop: AtomicBool::new(false),
        });
        shared.lock().read(clock.now_s());
        let sampler = sample_interval.and_then(|interval| {
            let (shared, clock) = (shared.clone(), clock.clone());
            thread::Builder::new()
                .name("energy".to_owned())
                .spawn(move || {
                    while !shared.stop.load(Ordering::Acquire) {
                        thread::park_timeout(interval);
                        shared.lock().read(clock.now_s());
                    }
                })
                .ok()
        });
        EnergyMeter {
            shared,
            clock,
            sampler,
        }
    }

    /// Watches the machine at rest for `window` and keeps the mean watts as the idle baseline.
    /// Call it before the run, with nothing else of the run at work. A window of zero leaves the
    /// baseline out.
    pub fn measure_idle(&mut self, window: Duration) {
        if window.is_zero() {
            return;
        }
        let (before, started_s) = self.readings();
        self.clock.sleep(window);
        let (after, ended_s) = self.readings();
        let elapsed_s = ended_s - started_s;
        let mut state = self.shared.lock();
        state.idle_window_s = Some(elapsed_s);
        for ((counter, before), after) in state.counters.iter_mut().zip(before).zip(after) {
            counter.idle_w = match (before, after) {
                (Ok(before_j), Ok(after_j)) => Ok((after_j - before_j) / elapsed_s),
                (Err(reason), _) | (_, Err(reason)) => Err(reason),
            };
        }
    }

    /// Opens a window; one that is open ends with the same reading, so that nothing falls between
    /// two windows. The caller has synchronised the device.
    pub fn begin(&mut self, purpose: Purpose) {
        self.turn(Some(purpose));
    }

    /// Ends the open window; does nothing when none is open. The caller has synchronised the
    /// device.
    pub fn end(&mut self) {
        self.turn(None);
    }

    /// The watts of the last seconds, all components together.
    pub fn live_watts(&self) -> Quantity {
        let mut state = self.shared.lock();
        let now_s = self.clock.now_s();
        let stale = |counter: &Counter| {
            counter
                .recent
                .back()
                .is_none_or(|&(read_s, _)| now_s - read_s >= SHORTEST_S)
        };
        if state.counters.iter().any(stale) {
            state.read(now_s);
        }
        let parts: Vec<(&str, Quantity)> = state
            .counters
            .iter()
            .map(|counter| (counter.channel.component().name(), counter.live_watts()))
            .collect();
        Quantity::sum(parts.iter().map(|(name, watts)| (*name, watts)))
    }

    /// Joules of the window that ended last, all components together.
    pub(crate) fn last_j(&self) -> Quantity {
        let state = self.shared.lock();
        let parts: Vec<(&str, Quantity)> = state
            .counters
            .iter()
            .map(|counter| (counter.channel.component().name(), counter.last_j()))
            .collect();
        Quantity::sum(parts.iter().map(|(name, energy_j)| (*name, energy_j)))
    }

    /// The names of the sources, as the report gives them.
    pub fn source_names(&self) -> Vec<String> {
        let state = self.shared.lock();
        state
            .counters
            .iter()
            .map(|counter| counter.channel.name().to_owned())
            .collect()
    }

    /// Everything accumulated in windows that have ended, and the idle window's seconds.
    pub(crate) fn components(&self) -> (Vec<ComponentReading>, Option<f64>) {
        let state = self.shared.lock();
        let idle_window_s = state.idle_window_s;
        let components = state
            .counters
            .iter()
            .map(|counter| counter.summary(idle_window_s))
            .collect();
        (components, idle_window_s)
    }

    fn turn(&mut self, next: Option<Purpose>) {
        let mut state = self.shared.lock();
        let readings = state.read(self.clock.now_s());
        let ending = state.open;
        state.open = next;
        for (counter, reading) in state.counters.iter_mut().zip(readings) {
            if let Some(purpose) = ending {
                counter.close(purpose, &reading);
            }
            if next.is_some() {
                counter.opened_j = reading;
            }
        }
    }

    fn readings(&self) -> (Vec<Result<f64, String>>, f64) {
        let now_s = self.clock.now_s();
        (self.shared.lock().read(now_s), now_s)
    }
}

impl Drop for EnergyMeter {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(sampler) = self.sampler.take() {
            sampler.thread().unpark();
            // A panic of the sampler has been printed; there is nothing to add while dropping.
            let _ = sampler.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A source that panicked leaves counters that are still readable: each holds its own.
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl State {
    fn read(&mut self, now_s: f64) -> Vec<Result<f64, String>> {
        self.counters
            .iter_mut()
            .map(|counter| counter.read(now_s))
            .collect()
    }
}

impl Channel {
    fn component(&self) -> Component {
        match self {
            Channel::Source(source) => source.component(),
            Channel::Missing { component, .. } => *component,
        }
    }

    fn name(&self) -> &str {
        match self {
            Channel::Source(source) => source.name(),
            Channel::Missing { .. } => "none",
        }
    }
}

impl Counter {
    fn new(channel: Channel) -> Counter {
        let idle_w = match &channel {
            Channel::Source(source) if !source.counts_idle() => Ok(0.0),
            Channel::Source(_) => Err("the idle baseline was not measured".to_owned()),
            Channel::Missing { reason, .. } => Err(reason.clone()),
        };
        Counter {
            channel,
            opened_j: Err("no window was opened".to_owned()),
            spent_j: [const { Ok(0.0) }; 3],
            last_j: Err("no window has ended".to_owned()),
            windows: [0; 3],
            idle_w,
            recent: VecDeque::new(),
        }
    }

    fn read(&mut self, now_s: f64) -> Result<f64, String> {
        match &mut self.channel {
            Channel::Missing { reason, .. } => Err(reason.clone()),
            Channel::Source(source) => match source.energy_j() {
                Ok(energy_j) => {
                    while self
                        .recent
                        .front()
                        .is_some_and(|&(read_s, _)| now_s - read_s > RECENT_S)
                    {
                        self.recent.pop_front();
                    }
                    self.recent.push_back((now_s, energy_j));
                    Ok(energy_j)
                }
                Err(error) => {
                    self.recent.clear();
                    Err(describe(&error))
                }
            },
        }
    }

    fn close(&mut self, purpose: Purpose, reading: &Result<f64, String>) {
        self.windows[purpose.index()] += 1;
        self.last_j = match (&self.opened_j, reading) {
            (Ok(opened_j), Ok(closed_j)) => Ok(closed_j - opened_j),
            (Err(reason), _) | (_, Err(reason)) => Err(reason.clone()),
        };
        let spent_j = &mut self.spent_j[purpose.index()];
        match (&self.last_j, &mut *spent_j) {
            (Ok(last_j), Ok(total_j)) => *total_j += last_j,
            // One window that could not be read leaves the total incomplete for good.
            (Err(reason), _) => *spent_j = Err(reason.clone()),
            (Ok(_), Err(_)) => {}
        }
    }

    /// Joules of the window that ended last.
    fn last_j(&self) -> Quantity {
        match (&self.channel, &self.last_j) {
            (Channel::Source(source), Ok(energy_j)) => source.label(*energy_j),
            (_, Err(reason)) | (Channel::Missing { reason, .. }, _) => {
                Quantity::unavailable(reason)
            }
        }
    }

    fn live_watts(&self) -> Quantity {
        let source = match &self.channel {
            Channel::Missing { reason, .. } => return Quantity::unavailable(reason),
            Channel::Source(source) => source,
        };
        let (Some(&(first_s, first_j)), Some(&(last_s, last_j))) =
            (self.recent.front(), self.recent.back())
        else {
            return Quantity::unavailable("the counter could not be read");
        };
        let elapsed_s = last_s - first_s;
        if elapsed_s < SHORTEST_S {
            return Quantity::unavailable("too few readings yet");
        }
        let spent_j = last_j - first_j;
        source
            .label(spent_j)
            .map(&format!("over {elapsed_s:.1} s"), |energy_j| {
                energy_j / elapsed_s
            })
    }

    fn summary(&self, idle_window_s: Option<f64>) -> ComponentReading {
        let idle_w = match (&self.idle_w, &self.channel) {
            (Err(reason), _) => Quantity::unavailable(reason),
            (Ok(_), Channel::Source(source)) if !source.counts_idle() => {
                Quantity::modelled(0.0, "by definition: the model charges busy time alone", [])
            }
            (Ok(watts), channel) => Quantity::measured(
                *watts,
                format!(
                    "{}, mean of {:.2} s at rest before the run",
                    channel.name(),
                    idle_window_s.unwrap_or_default()
                ),
            ),
        };
        let gross_j = Purpose::ALL.map(|purpose| {
            let spent_j = &self.spent_j[purpose.index()];
            match (&self.channel, spent_j) {
                (Channel::Missing { reason, .. }, _) => Quantity::unavailable(reason),
                (_, Err(reason)) => Quantity::unavailable(reason),
                (Channel::Source(_), Ok(_)) if self.windows[purpose.index()] == 0 => {
                    Quantity::unavailable(format!("no {} was measured", purpose.name()))
                }
                (Channel::Source(source), Ok(energy_j)) => source.label(*energy_j),
            }
        });
        ComponentReading {
            component: self.channel.component(),
            source: self.channel.name().to_owned(),
            idle_w,
            gross_j,
            windows: self.windows,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
