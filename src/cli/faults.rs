//! Faults of the program itself: a panic becomes one sentence, never a backtrace.

use std::{
    io::{self, Write},
    panic::{self, AssertUnwindSafe, PanicHookInfo},
};

/// From here on panics are told in one sentence on standard error. A server tells them in its log, once it has one.
pub(super) fn report() {
    panic::set_hook(Box::new(|fault| {
        // Who does not read standard error has the exit code.
        let _ = writeln!(io::stderr(), "error: {}", sentence(fault));
    }));
}

/// What `work` comes to; nothing where it panicked, which has been told.
pub(super) fn caught<T>(work: impl FnOnce() -> T) -> Option<T> {
    panic::catch_unwind(AssertUnwindSafe(work)).ok()
}

/// What a panic says of itself.
pub(super) fn sentence(fault: &PanicHookInfo<'_>) -> String {
    let place = fault.location().map(|place| format!(" at {}:{}", place.file(), place.line()));
    let what = fault.payload_as_str().unwrap_or("no reason given");
    format!(
        "a fault of understudy itself{}: {}; please report it with the command that was run",
        place.unwrap_or_default(),
        what.replace('\n', " ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The hook is the whole process's, so only what it would say is looked at.
    #[test]
    fn a_panic_is_one_sentence() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let before = panic::take_hook();
        let here = std::thread::current().id();
        panic::set_hook(Box::new(move |fault| {
            if std::thread::current().id() == here {
                let _ = sender.send(sentence(fault));
            } else {
                before(fault);
            }
        }));
        assert_eq!(caught(|| 7), Some(7));
        assert_eq!(caught(|| -> u8 { panic!("left\nright") }), None);
        drop(panic::take_hook());
        let told = receiver.recv().unwrap();
        assert!(told.contains("faults.rs:") && told.contains("left right"), "{told}");
        assert_eq!(told.lines().count(), 1);
    }
}
