//! Folders and tar archives of PNG, JPEG and WebP files, directly or in one folder per class.

use std::{
    collections::BTreeSet,
    fs,
    io::Read,
    path::{Component, Path, PathBuf},
};

use image::DynamicImage;
use tar::EntryType;
use understudy_models::{Error, Result, checkpoint::read};

use super::{
    Images, malformed,
    metadata::{METADATA, Metadata},
};

/// The largest file that is taken for a picture.
const MOST_BYTES: u64 = 64 << 20;

/// Reads a folder; images are in the order of their names.
pub(super) fn folder(path: &Path) -> Result<Images> {
    let metadata = Metadata::read(path)?;
    let mut collected = Collected::default();
    for entry in sorted(path)? {
        if name(&entry) == METADATA || collected.is_litter(&entry) {
            continue;
        }
        if !entry.is_dir() {
            collected.push(&entry, None, &read::whole(&entry, MOST_BYTES)?)?;
            continue;
        }
        collected.folders.insert(entry.clone());
        for file in sorted(&entry)? {
            if collected.is_litter(&file) {
                continue;
            }
            if file.is_dir() {
                let problem = format!(
                    "is a folder inside the class folder {}; images stand in their class's folder itself: move \
                     them there",
                    entry.display()
                );
                return Err(malformed(&file, problem));
            }
            collected.push(&file, Some(&entry), &read::whole(&file, MOST_BYTES)?)?;
        }
    }
    let files = std::mem::take(&mut collected.files);
    let mut images = collected.finish(path)?;
    if let Some(metadata) = metadata {
        metadata.add_to(&mut images, &files)?;
    }
    Ok(images)
}

/// Reads a tar archive; images are in its order. Names in errors are `archive/entry`.
pub(super) fn archive(path: &Path, unpacked: impl Read) -> Result<Images> {
    let broken = |error: std::io::Error| {
        // It may quote what it found, which need not be text.
        let error = error.to_string().escape_debug().to_string();
        malformed(path, format!("not a whole tar archive ({error}); fetch it again"))
    };
    let mut collected = Collected::default();
    for entry in tar::Archive::new(unpacked).entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        // Without `./`, with which some begin.
        let inside: PathBuf = entry
            .path()
            .map_err(broken)?
            .components()
            .filter(|component| matches!(component, Component::Normal(_)))
            .collect();
        let name = path.join(&inside);
        let litter = inside.ancestors().any(litter);
        if litter {
            collected.skipped += usize::from(!entry.header().entry_type().is_dir());
            continue;
        }
        match entry.header().entry_type() {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {}
            EntryType::Directory => {
                collected.folders.insert(inside);
                continue;
            }
            // Metadata for all that follows, as `git archive` writes it.
            EntryType::XGlobalHeader => continue,
            EntryType::Link => {
                return Err(malformed(
                    &name,
                    "is a hard link to another entry; pack the archive again with --hard-dereference",
                ));
            }
            EntryType::Symlink => {
                return Err(malformed(
                    &name,
                    "is a symbolic link; pack the archive again with --dereference",
                ));
            }
            _ => return Err(malformed(&name, "is neither a file nor a folder; leave it out")),
        }
        if inside.file_name().is_some_and(|name| name == METADATA) {
            return Err(malformed(&name, "captions are read from folders; unpack the archive"));
        }
        if entry.size() > MOST_BYTES {
            return Err(too_large(&name, entry.size()));
        }
        let bytes = read::to_end(&mut entry, MOST_BYTES).map_err(broken)?;
        let class = inside.parent().filter(|folder| !folder.as_os_str().is_empty());
        collected.push(&name, class, &bytes)?;
    }
    collected.finish(path)
}

/// Images as they come in.
#[derive(Default)]
struct Collected {
    /// Width and height of the first.
    size: Option<(u32, u32)>,
    /// Each picture, and its class's folder.
    pictures: Vec<(Picture, Option<PathBuf>)>,
    /// Each one's file.
    files: Vec<PathBuf>,
    /// Folders that were seen, with images or without.
    folders: BTreeSet<PathBuf>,
    /// Files and folders that were passed over.
    skipped: usize,
}

enum Picture {
    Gray(Vec<u8>),
    Rgb(Vec<u8>),
}

impl Collected {
    /// Whether to pass over it, which is counted.
    fn is_litter(&mut self, path: &Path) -> bool {
        let litter = litter(path);
        self.skipped += usize::from(litter);
        litter
    }

    fn push(&mut self, name: &Path, class: Option<&Path>, bytes: &[u8]) -> Result<()> {
        let decoded = image::load_from_memory(bytes).map_err(|error| {
            malformed(name, format!("no image that can be read ({error}); remove or replace it"))
        })?;
        let found = (decoded.width(), decoded.height());
        let size = *self.size.get_or_insert(found);
        if found != size {
            let problem = format!(
                "is {}×{}, the first image is {}×{}; all must be of one size",
                found.0, found.1, size.0, size.1
            );
            return Err(malformed(name, problem));
        }
        if let Some((_, first)) = self.pictures.first() {
            if first.is_some() != class.is_some() {
                let problem =
                    "some images stand in class folders and some do not; use one or the other";
                return Err(malformed(name, problem));
            }
            let parent = |class: Option<&Path>| class.and_then(Path::parent).map(Path::to_owned);
            if let (Some(first), true) = (first, parent(first.as_deref()) != parent(class)) {
                let problem = format!(
                    "its folder is not beside the first class's, {}; the folders of all classes must stand in \
                     one folder",
                    first.display()
                );
                return Err(malformed(name, problem));
            }
        }
        let picture = Picture::of(decoded).ok_or_else(|| {
            malformed(name, "is not 8-bit gray or RGB, or is transparent; convert it first")
        })?;
        self.pictures.push((picture, class.map(Path::to_owned)));
        self.files.push(name.to_owned());
        Ok(())
    }

    fn finish(self, path: &Path) -> Result<Images> {
        let Some((width, height)) = self.size else {
            return Err(malformed(path, "holds no images"));
        };
        // A gray file among coloured ones is a colour image that happens to be gray.
        let gray = self.pictures.iter().all(|(picture, _)| matches!(picture, Picture::Gray(_)));
        let classes: BTreeSet<&PathBuf> =
            self.pictures.iter().filter_map(|(_, class)| class.as_ref()).collect();
        self.refuse_empty(path, &classes)?;
        let class_names = in_order(classes.iter().map(|class| name(class)).collect());
        let number = |class: &Option<PathBuf>| {
            let class = name(class.as_ref()?);
            class_names.iter().position(|name| *name == class).map(|number| number as u32)
        };
        let labels = self.pictures.iter().map(|(_, class)| number(class)).collect();
        let mut pixels = Vec::new();
        for (picture, _) in self.pictures {
            match picture {
                Picture::Gray(bytes) if gray => pixels.extend(bytes),
                Picture::Gray(bytes) => pixels.extend(bytes.iter().flat_map(|&byte| [byte; 3])),
                Picture::Rgb(bytes) => pixels.extend(bytes),
            }
        }
        Ok(Images {
            channels: if gray { 1 } else { 3 },
            height: height as usize,
            width: width as usize,
            pixels,
            labels,
            class_names,
            captions: None,
            skipped: self.skipped,
        })
    }

    /// A folder beside the classes' that holds no images would be a class, were it not empty: every later
    /// class would have another number.
    fn refuse_empty(&self, path: &Path, classes: &BTreeSet<&PathBuf>) -> Result<()> {
        let Some(beside) = classes.first().and_then(|class| class.parent()) else { return Ok(()) };
        let empty =
            |folder: &&PathBuf| folder.parent() == Some(beside) && !classes.contains(folder);
        match self.folders.iter().find(empty) {
            None => Ok(()),
            Some(folder) => {
                // Entries of an archive are not on the disk.
                let folder = path.join(folder);
                Err(malformed(&folder, "is a class folder without images; fill it, or remove it"))
            }
        }
    }
}

impl Picture {
    /// Nothing where pixels would be lost: more than 8 bits, or transparency that is used.
    fn of(decoded: DynamicImage) -> Option<Self> {
        match decoded {
            DynamicImage::ImageLuma8(image) => Some(Self::Gray(image.into_raw())),
            DynamicImage::ImageRgb8(image) => Some(Self::Rgb(image.into_raw())),
            DynamicImage::ImageLumaA8(image) => opaque::<2>(&image).map(Self::Gray),
            DynamicImage::ImageRgba8(image) => opaque::<4>(&image).map(Self::Rgb),
            _ => None,
        }
    }
}

/// The bytes without alpha, where that is 255 throughout.
fn opaque<const N: usize>(bytes: &[u8]) -> Option<Vec<u8>> {
    let pixels = bytes.as_chunks::<N>().0;
    let opaque = pixels.iter().all(|pixel| pixel[N - 1] == u8::MAX);
    opaque.then(|| pixels.iter().flat_map(|pixel| pixel[..N - 1].to_vec()).collect())
}

/// What file managers, notebooks and version control leave among images.
fn litter(path: &Path) -> bool {
    let name = name(path);
    let names = [
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
        "__macosx",
        "__pycache__",
        "@eadir",
        "$recycle.bin",
        "system volume information",
        "lost+found",
    ];
    name.starts_with('.') || names.contains(&name.to_lowercase().as_str())
}

/// Names in the order of the classes' numbers: as numbers where all are, else as text.
fn in_order(mut names: Vec<String>) -> Vec<String> {
    let number = |name: &String| {
        let digits = name.bytes().all(|byte| byte.is_ascii_digit());
        name.parse::<u64>().ok().filter(|_| digits)
    };
    if names.iter().all(|name| number(name).is_some()) {
        names.sort_by_key(|name| (number(name), name.clone()));
    } else {
        names.sort();
    }
    names
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn sorted(folder: &Path) -> Result<Vec<PathBuf>> {
    let io = |source| Error::Io { path: folder.to_owned(), source };
    let entries = fs::read_dir(folder).map_err(io)?;
    let mut paths: Vec<PathBuf> =
        entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>().map_err(io)?;
    paths.sort();
    Ok(paths)
}

fn too_large(name: &Path, bytes: u64) -> Error {
    let most = MOST_BYTES >> 20;
    malformed(name, format!("has {bytes} bytes, a picture at most {most} MiB; leave it out"))
}
