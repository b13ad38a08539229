//! Signals that ask a run to stop: finish the step, write a checkpoint, exit with status 3.
//!
//! SIGTERM is what schedulers send at the end of a time slot, SIGUSR1 what Slurm sends ahead
//! of it (`--signal=USR1@120`), SIGINT is Ctrl-C. A second Ctrl-C ends the process at once, for
//! whoever cannot wait for the checkpoint.

use std::io;

use calor_train::StopFlag;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;

/// A flag that is raised when a signal asks to stop. Made once, before a run starts.
pub fn stop_on_signals() -> io::Result<StopFlag> {
    let stop = StopFlag::new();
    // The order matters: the conditional shutdown looks at the flag before the second
    // registration raises it, so only the second Ctrl-C ends the process.
    flag::register_conditional_shutdown(SIGINT, 128 + SIGINT, stop.shared())?;
    for signal in [SIGINT, SIGTERM, SIGUSR1] {
        flag::register(signal, stop.shared())?;
    }
    Ok(stop)
}
