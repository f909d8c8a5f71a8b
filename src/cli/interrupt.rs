//! Ctrl-C: the first asks for an end, the second is one.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};

/// Whether the process was asked to end.
#[derive(Debug, Clone, Default)]
pub(super) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From now on the first SIGINT or SIGTERM is told by [`Interrupt::came`], and the second ends the process with
    /// 128 + its number.
    ///
    /// # Errors
    /// A sentence when signals cannot be received.
    pub(super) fn listen() -> Result<Self, String> {
        let interrupt = Self::default();
        let listen = |signal| -> io::Result<()> {
            // In this order: the first signal only raises the flag that lets the second end the process.
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&interrupt.0))?;
            flag::register(signal, Arc::clone(&interrupt.0))?;
            Ok(())
        };
        [SIGINT, SIGTERM]
            .into_iter()
            .try_for_each(listen)
            .map_err(|error| format!("signals cannot be received: {error}"))?;
        Ok(interrupt)
    }

    /// Whether one came.
    pub(super) fn came(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
