//! Where the samples of a pool are kept.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use memmap2::MmapMut;
use understudy_models::{Error, Result};

/// Rows of f32, all of one length.
pub(super) enum Rows {
    /// In the memory of a device, `[rows, length]`; a checkpoint holds them.
    Memory(Tensor),
    /// In a memory-mapped file that holds every row twice: what a checkpoint saw is not written to again
    /// until the next one, so a run that is killed finds the rows of its last checkpoint. A checkpoint
    /// holds only which copy is which.
    Mapped(Mapped),
}

pub(super) struct Mapped {
    map: MmapMut,
    /// Kept for its lock, and to see whether it is still whole.
    file: File,
    path: PathBuf,
    length: usize,
    /// Which copy of each row is the newest, and which the last checkpoint's.
    newest: Vec<u8>,
    kept: Vec<u8>,
}

/// Bytes before the rows: a line of text that says whose they are, then zeros. A page, so that rows are
/// aligned.
const HEADER: usize = 4096;

impl Rows {
    /// `count` rows of zeros in the memory of a device.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(super) fn in_memory(count: usize, length: usize, device: &Device) -> Result<Self> {
        Ok(Self::Memory(Tensor::zeros((count, length), DType::F32, device)?))
    }

    /// `count` rows in the file at `path`, which is made where it does not exist. The owner's line says whose
    /// pool it is.
    ///
    /// While the file is mapped nobody may shorten it: the next access to what is gone would end the process.
    /// Its lock keeps other runs away, but not other programs.
    ///
    /// # Errors
    /// [`Error::Io`] (no room on the disk, no permission), [`Error::Value`] when it is something else than a
    /// file, another owner's, or in use.
    pub(super) fn mapped(path: &Path, count: usize, length: usize, owner: &Owner) -> Result<Self> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let refuse = |problem: String, remedy: &str| {
            Err(Error::value(format!("pool-file {}", path.display()), problem, remedy))
        };
        let bytes = HEADER + 2 * count * length * size_of::<f32>();
        let mut open = OpenOptions::new();
        open.read(true).write(true);
        let (file, new) = match open.clone().create_new(true).open(path) {
            Ok(file) => (file, true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                // A pipe would not even open.
                if !std::fs::metadata(path).map_err(io)?.is_file() {
                    return refuse("not a regular file".into(), "name another file");
                }
                (open.open(path).map_err(io)?, false)
            }
            Err(source) => return Err(io(source)),
        };
        let mut header = vec![0; HEADER];
        if file.try_lock().is_err() {
            let _ = (&file).read(&mut header);
            let process = lines(&header).nth(1).unwrap_or("of another run").to_owned();
            return refuse(format!("in use ({process})"), "wait for it, or name another file");
        }
        let there = file.metadata().map_err(io)?.len();
        let read = (&file).read(&mut header).map_err(io)?;
        // A process that was killed while it made the file left it without an owner.
        let unfinished = lines(&header[..read]).next() == Some(UNFINISHED);
        if there == 0 || unfinished {
            create(&file, bytes).map_err(|source| {
                if new {
                    let _ = std::fs::remove_file(path);
                }
                io(source)
            })?;
        } else if there != bytes as u64 {
            return refuse(
                format!("of {there} bytes"),
                &format!("this pool needs {bytes}; name another file, or remove this one"),
            );
        }
        // SAFETY: nobody else writes to or shortens the file while it is mapped: this process holds its
        // lock, which every run takes, until the map is gone.
        let mut map = unsafe { MmapMut::map_mut(&file) }.map_err(io)?;
        let found = lines(&map[..HEADER]).next().unwrap_or_default().to_owned();
        if found != UNFINISHED && found != owner.line && Some(&found) != owner.earlier.as_ref() {
            let shown: String = found.chars().take(100).collect();
            return refuse(
                format!("something else (it begins with {shown:?})"),
                &format!("the pool is {:?}; name another file, or remove this one", owner.line),
            );
        }
        sign(&mut map[..HEADER], &owner.line);
        map.flush_range(0, HEADER).map_err(io)?;
        let path = path.to_owned();
        let (newest, kept) = (vec![0; count], vec![0; count]);
        Ok(Self::Mapped(Mapped { map, file, path, length, newest, kept }))
    }

    /// The rows of `slots` on a device, one after another.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(super) fn gather(&self, slots: &[usize], device: &Device) -> Result<Tensor> {
        match self {
            Self::Memory(all) => {
                let rows = all.index_select(&numbers(slots, all.device())?, 0)?;
                Ok(rows.to_device(device)?)
            }
            Self::Mapped(rows) => {
                rows.check()?;
                let mut values: Vec<f32> = Vec::with_capacity(slots.len() * rows.length);
                for &slot in slots {
                    let range = rows.range(slot, rows.newest[slot]);
                    values.extend_from_slice(bytemuck::cast_slice(&rows.map[range]));
                }
                Ok(Tensor::from_vec(values, (slots.len(), rows.length), device)?)
            }
        }
    }

    /// Replaces the rows of `slots`, each of which is named once, by those of `new`.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(super) fn scatter(&mut self, slots: &[usize], new: &Tensor) -> Result<()> {
        match self {
            Self::Memory(all) => {
                let new = new.to_device(all.device())?.contiguous()?;
                let places = numbers(slots, all.device())?.unsqueeze(1)?;
                let places = places.broadcast_as(new.shape())?.contiguous()?;
                all.scatter_set(&places, &new, 0)?;
            }
            Self::Mapped(rows) => {
                let values: Vec<f32> = new.flatten_all()?.to_vec1()?;
                rows.check()?;
                for (&slot, row) in slots.iter().zip(values.chunks_exact(rows.length)) {
                    rows.newest[slot] = 1 - rows.kept[slot];
                    let range = rows.range(slot, rows.newest[slot]);
                    rows.map[range].copy_from_slice(bytemuck::cast_slice(row));
                }
            }
        }
        Ok(())
    }

    /// What a checkpoint must hold: the values, or which copy is which, once these are on disk.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file; whatever the device says.
    pub(super) fn save(&self) -> Result<Saved> {
        match self {
            Self::Memory(all) => Ok(Saved::Values(all.flatten_all()?.to_vec1()?)),
            Self::Mapped(rows) => {
                rows.check()?;
                let io = |source| Error::Io { path: rows.path.clone(), source };
                rows.map.flush().map_err(io)?;
                Ok(Saved::Copies(rows.newest.clone()))
            }
        }
    }

    /// Tells that what [`Rows::save`] gave is on disk and will be what a resumed run finds.
    pub(super) fn keep(&mut self) {
        if let Self::Mapped(rows) = self {
            rows.kept.copy_from_slice(&rows.newest);
        }
    }

    /// Goes back to what a checkpoint held; false where that is of another size or kind.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(super) fn restore(&mut self, saved: Saved) -> Result<bool> {
        match (self, saved) {
            (Self::Memory(all), Saved::Values(saved)) if saved.len() == all.elem_count() => {
                *all = Tensor::from_vec(saved, all.shape(), all.device())?;
                Ok(true)
            }
            (Self::Mapped(rows), Saved::Copies(saved))
                if saved.len() == rows.newest.len() && saved.iter().all(|&copy| copy < 2) =>
            {
                rows.newest.copy_from_slice(&saved);
                rows.kept = saved;
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

/// What a checkpoint holds of the rows.
pub(super) enum Saved {
    /// All values.
    Values(Vec<f32>),
    /// The copy, 0 or 1, of each row.
    Copies(Vec<u8>),
}

/// Slots as a device takes them; a pool has fewer than 2³² ([`super::Pool::new`]).
fn numbers(slots: &[usize], device: &Device) -> Result<Tensor> {
    let numbers = slots.iter().map(|&slot| slot as u32).collect();
    Ok(Tensor::from_vec(numbers, slots.len(), device)?)
}

impl Mapped {
    /// Refuses to touch a file that another program has shortened, which would end the process. Between this look and
    /// the next one nothing helps: whoever shortens the file of a running pool ends the run.
    fn check(&self) -> Result<()> {
        let io = |source| Error::Io { path: self.path.clone(), source };
        let (there, mapped) = (self.file.metadata().map_err(io)?.len(), self.map.len() as u64);
        if there >= mapped {
            return Ok(());
        }
        let problem = format!(
            "was shortened by another program, from {mapped} to {there} bytes, while the run used it; remove it and \
             start the run anew"
        );
        Err(Error::Format { path: self.path.clone(), problem })
    }

    fn range(&self, index: usize, copy: u8) -> std::ops::Range<usize> {
        let bytes = self.length * size_of::<f32>();
        let from = HEADER + (2 * index + usize::from(copy)) * bytes;
        from..from + bytes
    }
}

/// Whose pool a file holds: the first line of its header.
pub(super) struct Owner {
    /// Text without line breaks.
    pub(super) line: String,
    /// What earlier versions wrote there, where theirs is to be taken over.
    pub(super) earlier: Option<String>,
}

/// The first line of a file that has not all of its bytes yet.
const UNFINISHED: &str = "understudy pool: unfinished";

/// The lines of a header as far as they are text; the rest of it is zeros.
fn lines(header: &[u8]) -> impl Iterator<Item = &str> {
    let end = header.iter().position(|&byte| byte == 0).unwrap_or(header.len());
    header[..end].split(|&byte| byte == b'\n').map(|line| str::from_utf8(line).unwrap_or_default())
}

/// Writes a header's owner and, for whoever finds the file locked, this process's number.
fn sign(header: &mut [u8], owner: &str) {
    let text = format!("{owner}\nprocess {}\n", std::process::id());
    let text = &text.as_bytes()[..text.len().min(HEADER)];
    header.fill(0);
    header[..text.len()].copy_from_slice(text);
}

/// Every byte is written, so that a full disk is met here and not while the rows are in use.
fn create(mut file: &File, bytes: usize) -> std::io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    let mut header = vec![0; HEADER];
    sign(&mut header, UNFINISHED);
    file.write_all(&header)?;
    let zeros = vec![0; 1 << 20];
    let mut left = bytes - HEADER;
    while left > 0 {
        let part = left.min(zeros.len());
        file.write_all(&zeros[..part])?;
        left -= part;
    }
    file.sync_all()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_file_that_another_program_shortens_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pool");
        let owner = Owner { line: "mine".into(), earlier: None };
        let mut rows = Rows::mapped(&path, 3, 5, &owner).unwrap();
        rows.gather(&[0, 2], &Device::Cpu).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(10).unwrap();
        let new = Tensor::zeros((1, 5), DType::F32, &Device::Cpu).unwrap();
        let problems = [
            rows.gather(&[0], &Device::Cpu).map(|_| ()).unwrap_err(),
            rows.scatter(&[0], &new).unwrap_err(),
            rows.save().map(|_| ()).unwrap_err(),
        ];
        for problem in problems {
            let problem = problem.to_string();
            assert!(problem.contains("pool: was shortened"), "{problem}");
        }
    }
}
