//! Files and folders in the making: under a temporary name, locked by the process that writes them.
//!
//! The name has the process's number and a random one, so that nothing of anybody else's is ever overwritten or
//! removed. A process that is killed loses its lock; the next one that writes into the same folder removes what was
//! left there.

use std::{
    collections::{HashSet, hash_map::RandomState},
    ffi::OsString,
    fs::{self, File, OpenOptions},
    hash::{BuildHasher, Hasher},
    io,
    path::{Path, PathBuf},
    sync::{LazyLock, Mutex, PoisonError},
};

/// How the name ends, after a dot, the process's number and a random one, of [`DIGITS`] hexadecimal digits together,
/// half of them each.
const SUFFIX: &str = ".partial";
const DIGITS: usize = 16;

/// A file or a folder that is being written; removed when it is dropped.
#[derive(Debug)]
pub(super) struct Partial {
    /// Where it is while it is written.
    pub(super) path: PathBuf,
    /// The file, or the folder opened for its lock.
    file: File,
}

impl Partial {
    /// An empty file in the folder in which `target` will be.
    pub(super) fn file(target: &Path) -> io::Result<Self> {
        let create = |path: &Path| OpenOptions::new().write(true).create_new(true).open(path);
        Self::create(target, create)
    }

    /// An empty folder beside `target`, of which one process makes one at a time.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] while another process makes one, with its number; what the system says.
    pub(super) fn folder(target: &Path) -> io::Result<Self> {
        let partial = Self::create(target, |path| {
            fs::create_dir(path)?;
            File::open(path)
        })?;
        for entry in fs::read_dir(folder_of(target))? {
            let path = entry?.path();
            // What nobody holds is left over, and was removed if it could be.
            if path != partial.path && is_of(&path, target) && is_held(&path) {
                let process = process(&path).unwrap_or_default();
                let problem = format!("being made by process {process}");
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, problem));
            }
        }
        Ok(partial)
    }

    fn create(target: &Path, create: impl Fn(&Path) -> io::Result<File>) -> io::Result<Self> {
        let folder = folder_of(target);
        reclaim_once(folder);
        loop {
            let path = folder.join(name(target));
            let file = create(&path)?;
            // Between the two calls another process may have taken it for an orphan.
            if file.try_lock().is_ok() && fs::symlink_metadata(&path).is_ok() {
                return Ok(Self { path, file });
            }
        }
    }

    /// The file.
    pub(super) fn as_file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Gives it its name, which it has after a crash of the system, too.
    pub(super) fn finish(self, target: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, target)?;
        sync(folder_of(target))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After `finish` nothing is there any more, and of a failure to clean up there is nobody to tell.
        let _ = remove(&self.path);
    }
}

/// Removes what processes that were killed left in `folder`.
///
/// # Errors
/// Whatever the system says when the folder is read.
pub(super) fn reclaim(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let plain = fs::symlink_metadata(&path).is_ok_and(|file| file.is_file() || file.is_dir());
        if plain && stem(&path).is_some() && !is_held(&path) {
            let _ = remove(&path);
        }
    }
    Ok(())
}

/// As [`reclaim`], for the first time that this process writes into the folder.
fn reclaim_once(folder: &Path) {
    static SEEN: LazyLock<Mutex<HashSet<PathBuf>>> = LazyLock::new(Mutex::default);
    let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    if seen.insert(folder.to_owned()) {
        // A folder that cannot be read can still be written to.
        let _ = reclaim(folder);
    }
}

/// Makes the names in a folder durable, where the system can.
pub(super) fn sync(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

/// The folder a file is in.
pub(super) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// `.NAME.0123456789abcdef.partial`
fn name(target: &Path) -> OsString {
    // Seeded by the system, anew for every value.
    let random = RandomState::new().build_hasher().finish() as u32;
    let process = std::process::id();
    let mut name = OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(format!(".{process:08x}{random:08x}{SUFFIX}"));
    name
}

/// What stands between the first dot and the numbers, and the numbers; nothing for other names.
fn stem(path: &Path) -> Option<(&[u8], &[u8; DIGITS])> {
    let name = path.file_name()?.as_encoded_bytes();
    let name = name.strip_prefix(b".")?.strip_suffix(SUFFIX.as_bytes())?;
    let (stem, digits) = name.split_last_chunk::<DIGITS>()?;
    let hexadecimal = digits.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    hexadecimal.then_some((stem.strip_suffix(b".")?, digits))
}

/// Whether it is to become `target`.
fn is_of(path: &Path, target: &Path) -> bool {
    let name = target.file_name().unwrap_or_default().as_encoded_bytes();
    stem(path).is_some_and(|(stem, _)| stem == name)
}

/// The number of the process that made it.
fn process(path: &Path) -> Option<u32> {
    let (_, digits) = stem(path)?;
    u32::from_str_radix(str::from_utf8(&digits[..DIGITS / 2]).ok()?, 16).ok()
}

/// Whether a process still writes it: who does holds its lock.
fn is_held(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| file.try_lock().is_err())
}

fn remove(path: &Path) -> io::Result<()> {
    if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}
