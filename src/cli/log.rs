//! Lines on standard error or standard output of a server, written by a thread of their own.
//!
//! Whoever reads them may stop reading, and then writing stops as well. No request waits for that: lines
//! wait in bounded memory, and those that find no room are dropped and counted. tracing-appender does the same, but
//! brings a calendar's six crates, and at the end prints to standard output, which may be stuck, too.

use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    thread,
    time::Duration,
};

use prometheus::IntCounter;
use tracing_subscriber::fmt::MakeWriter;

/// Bytes of lines that may wait.
const WAITING_BYTES: usize = 1 << 20;

/// Where lines go; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Log {
    lines: Sender<Message>,
    waiting: Arc<AtomicUsize>,
    /// Lines that were dropped.
    pub(super) dropped: IntCounter,
}

enum Message {
    Line(Vec<u8>),
    /// All lines before it are to be written, and whoever asked to be told.
    Flush(SyncSender<()>),
}

impl Log {
    /// Starts the thread that writes to `out`.
    ///
    /// # Errors
    /// A sentence when the system gives no thread.
    pub(super) fn start(out: impl Write + Send + 'static) -> Result<Self, String> {
        let (lines, messages) = channel();
        let dropped = IntCounter::new(
            "understudy_log_lines_dropped_total",
            "Lines that the log had no room for.",
        );
        let dropped = dropped.map_err(|error| error.to_string())?;
        let waiting = Arc::new(AtomicUsize::new(0));
        let (counted, lost) = (Arc::clone(&waiting), dropped.clone());
        thread::Builder::new()
            .name("log".into())
            .spawn(move || write(out, &messages, &counted, &lost))
            .map_err(|error| format!("no thread for the log: {error}"))?;
        Ok(Self { lines, waiting, dropped })
    }

    /// Waits until all lines are written, but not longer than that.
    pub(super) fn flush(&self, patience: Duration) {
        let (done, told) = sync_channel(1);
        if self.lines.send(Message::Flush(done)).is_ok() {
            let _ = told.recv_timeout(patience);
        }
    }

    /// Writes a text and the end of its line.
    pub(super) fn line(&self, text: &str) {
        self.send(format!("{text}\n").into_bytes());
    }

    fn send(&self, line: Vec<u8>) {
        let room = |waiting: usize| {
            let after = waiting + line.len();
            (after <= WAITING_BYTES).then_some(after)
        };
        let taken = self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).is_ok();
        if !taken || self.lines.send(Message::Line(line)).is_err() {
            self.dropped.inc();
        }
    }
}

fn write(
    mut out: impl Write,
    messages: &Receiver<Message>,
    waiting: &AtomicUsize,
    dropped: &IntCounter,
) {
    let mut told = 0;
    for message in messages {
        match message {
            Message::Line(line) => {
                // A line that is not taken is gone; the next may be.
                let _ = out.write_all(&line).and_then(|()| out.flush());
                waiting.fetch_sub(line.len(), Ordering::Relaxed);
            }
            Message::Flush(done) => {
                let _ = out.flush();
                let _ = done.try_send(());
            }
        }
        let lines = dropped.get();
        if lines > told {
            told = lines;
            tracing::warn!(lines, "lines of the log were dropped: nobody read them in time");
        }
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line { log: self.clone(), bytes: Vec::new() }
    }
}

/// A line on its way; whole when dropped.
pub(super) struct Line {
    log: Log,
    bytes: Vec<u8>,
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if !self.bytes.is_empty() {
            self.log.send(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Standard error whose reader reads when told.
    struct Pipe {
        go: Receiver<()>,
        read: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.go.recv();
            self.read.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_stops_holds_nobody_up_and_what_it_misses_is_counted() {
        let (reads, go) = channel();
        let read = Arc::default();
        let log = Log::start(Pipe { go, read: Arc::clone(&read) }).unwrap();
        let line = vec![b'x'; 1023];
        let lines = 2 * WAITING_BYTES / 1024;
        for _ in 0..lines {
            log.make_writer().write_all(&[&line[..], b"\n"].concat()).unwrap();
        }
        assert_eq!(log.dropped.get() as usize, lines / 2);
        // Nor does the end wait for it.
        log.flush(Duration::from_millis(1));
        // The reader is back.
        drop(reads);
        log.flush(Duration::from_secs(60));
        assert_eq!(read.lock().unwrap().len(), WAITING_BYTES);
        log.make_writer().write_all(b"more\n").unwrap();
        log.flush(Duration::from_secs(60));
        assert!(read.lock().unwrap().ends_with(b"x\nmore\n"));
        assert_eq!(log.dropped.get() as usize, lines / 2);
    }
}
