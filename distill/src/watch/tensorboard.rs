//! TensorBoard's event files: TFRecords of `tensorflow.Event` messages, as far as scalars need them.
//!
//! A record is its length (u64), a masked CRC-32C of that, the bytes, and theirs; all little-endian
//! (tensorflow/core/lib/io/record_writer.cc). The messages are written by hand: event.proto has
//! `wall_time = 1` (double), `step = 2` (int64), `file_version = 3`, `summary = 5`, `session_log = 7`;
//! a summary is `value = 1` of `tag = 1`, `simple_value = 2` (float).

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use understudy_models::{Error, Result};

/// An event file of one session.
pub(super) struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Begins a file in `folder`. TensorBoard drops what earlier files say of later steps than `step`.
    pub(super) fn create(folder: &Path, step: u64) -> Result<Self> {
        let (seconds, process) = (now().floor(), std::process::id());
        let path = folder.join(format!("events.out.tfevents.{seconds:.0}.understudy.{process}"));
        let io = |source| Error::Io { path: path.clone(), source };
        let file = OpenOptions::new().append(true).create(true).open(&path).map_err(io)?;
        let mut events = Self { path, file };
        events.event(0, |event| bytes(event, 3, b"brain.Event:2"))?;
        // SessionLog.START = 1: a restart at this step.
        events.event(step + 1, |event| {
            let mut log = Vec::new();
            varint(&mut log, 1 << 3);
            varint(&mut log, 1);
            bytes(event, 7, &log);
        })?;
        Ok(events)
    }

    /// Writes one point per tag.
    pub(super) fn scalars(&mut self, step: u64, scalars: &[(&str, f32)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in scalars {
            let mut point = Vec::new();
            bytes(&mut point, 1, tag.as_bytes());
            varint(&mut point, 2 << 3 | 5);
            point.extend_from_slice(&value.to_le_bytes());
            bytes(&mut summary, 1, &point);
        }
        self.event(step, |event| bytes(event, 5, &summary))
    }

    /// Brings everything to disk.
    pub(super) fn sync(&mut self) -> Result<()> {
        self.file.sync_all().map_err(|source| Error::Io { path: self.path.clone(), source })
    }

    fn event(&mut self, step: u64, what: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let mut event = Vec::new();
        varint(&mut event, 1 << 3 | 1);
        event.extend_from_slice(&now().to_le_bytes());
        varint(&mut event, 2 << 3);
        varint(&mut event, step);
        what(&mut event);

        let length = (event.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend_from_slice(&masked_crc(&length).to_le_bytes());
        record.extend_from_slice(&event);
        record.extend_from_slice(&masked_crc(&event).to_le_bytes());
        let io = |source| Error::Io { path: self.path.clone(), source };
        self.file.write_all(&record).map_err(io)
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// A protocol buffer's number.
fn varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Field `field` of bytes, text or a message.
fn bytes(out: &mut Vec<u8>, field: u64, content: &[u8]) {
    varint(out, field << 3 | 2);
    varint(out, content.len() as u64);
    out.extend_from_slice(content);
}

/// TensorFlow rotates and shifts a CRC, so that one of data that holds CRCs is no special case.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// CRC-32C (Castagnoli), bit by bit: a few hundred bytes every few steps.
fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            if crc & 1 == 1 { crc >> 1 ^ 0x82F6_3B78 } else { crc >> 1 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 3720, appendix B.4, and the catalogue's check value.
    #[test]
    fn crc_gives_the_known_answers() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
    }
}
