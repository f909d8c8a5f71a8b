//! What a text-to-image teacher is told on its walks: prompts, encoded once by its own text encoder, and how far each
//! trajectory is guided.

use std::cell::{OnceCell, RefCell};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{Device, Tensor};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use understudy_models::checkpoint::{Reader, read, write_with};
use understudy_models::text::{PromptStates, Tokenizer};
use understudy_models::{Conditioning, Error, Prompt, Result};

use crate::data::hex;
use crate::generate::Captions;
use crate::guidance::Guidance;
use crate::prompts::Prompts;
use crate::random::{self, Purpose};
use crate::teacher::Teacher;
use crate::training_batch::TextConditions;

/// Prompts as a network is told them, and the guidance of the walks.
pub struct Prompting {
    guidance: Guidance,
    prompts: Prompts,
    shape: Prompt,
    /// SHA-256 of all that decides what a prompt comes to.
    encoder: String,
    /// The file the states are kept in; in memory without one.
    file: Option<PathBuf>,
    /// The text encoder, until everything is encoded.
    reader: RefCell<Option<Reader>>,
    table: OnceCell<Table>,
}

/// The states of the empty prompt, then those of all prompts.
enum Table {
    /// f32 `[prompts + 1, tokens · width]` on the CPU.
    Memory(Tensor),
    /// A safetensors file, of which what is asked for is read; where its numbers begin.
    File { file: File, path: PathBuf, start: u64 },
}

/// Prompts that are encoded together.
const TOGETHER: usize = 32;
/// The tensor's name in the file, and what its metadata says beside its shape.
const NAME: &str = "states";
const PROMPTS: &str = "prompts_sha256";
const ENCODER: &str = "text_encoder_sha256";
/// Bytes of the longest header that is read.
const HEADER_LIMIT: u64 = 1 << 16;

impl Prompting {
    /// Refuses what [`Prompting::new`] would refuse, without its text encoder; gives the shape of a prompt's states.
    ///
    /// # Errors
    /// [`Error::Value`] naming a prompt that is longer than the text encoder takes, a scale that means nothing, and a
    /// teacher that reads no prompts; [`Error::Io`] and [`Error::Format`] naming a tokenizer that cannot be read.
    pub fn check(teacher: &Teacher, prompts: &Prompts, guidance: Guidance) -> Result<Prompt> {
        guidance.check()?;
        let geometry = teacher.geometry();
        let tokenizer = teacher.model().tokenizer()?;
        let (Some(shape), Some(tokenizer)) = (geometry.prompt, tokenizer) else {
            let remedy =
                "draws after no text; leave out --prompts, or name a text-to-image teacher";
            return Err(Error::value("--teacher", &teacher.name, remedy));
        };
        if matches!(geometry.conditioning, Conditioning::TextTime { .. }) {
            let remedy = "a teacher that takes a pooled text beside the prompt (Stable Diffusion XL and 3) is served, and neither distilled nor trained; \
                          name one of Stable Diffusion 1 or 2";
            return Err(Error::value("teacher's addition_embed_type", &teacher.name, remedy));
        }
        if geometry.guidance || geometry.learned_variance() {
            let (field, what) = match geometry.guidance {
                true => ("time_cond_proj_dim", "takes the guidance scale as an input"),
                false => ("out_channels", "tells a variance"),
            };
            let remedy = format!(
                "a text-to-image teacher that {what} is not supported; name the one that it was made from"
            );
            return Err(Error::value(format!("teacher's {field}"), &teacher.name, remedy));
        }
        check_lengths(&tokenizer, prompts, shape)?;
        Ok(shape)
    }

    /// Of a teacher that reads prompts. Their states are kept in `file`, or taken from there where they are there already.
    ///
    /// # Errors
    /// As [`Prompting::check`]; [`Error::Value`] naming a file with states of other prompts or of another text encoder;
    /// [`Error::Io`] and [`Error::Format`] naming a file that cannot be read.
    pub fn new(
        teacher: &Teacher,
        prompts: Prompts,
        guidance: Guidance,
        file: Option<PathBuf>,
    ) -> Result<Self> {
        let shape = Self::check(teacher, &prompts, guidance)?;
        let encoder = files_sha256(&teacher.model().reader_files()?)?;
        let there = file.clone().filter(|file| file.exists());
        let reader = match there {
            Some(_) => None,
            None => {
                teacher.model().reader(teacher.network().dtype(), teacher.network().device())?
            }
        };
        let reader = RefCell::new(reader);
        let mut prompting =
            Self { guidance, prompts, shape, encoder, file, reader, table: OnceCell::new() };
        if let Some(file) = there {
            prompting.table = prompting.open(&file)?.into();
        }
        Ok(prompting)
    }

    /// What the student learns of guidance.
    pub fn guidance(&self) -> Guidance {
        self.guidance
    }

    /// What the walks are told by, by content.
    pub(crate) fn identity(&self) -> Map<String, Value> {
        let (guidance, scale) = match self.guidance {
            Guidance::Keep { scale } => ("keep", json!(scale)),
            Guidance::Distil { least, most } => ("distil", json!([least, most])),
        };
        let mut identity = Map::new();
        identity.insert("prompts".into(), self.prompts.texts().len().into());
        identity.insert(PROMPTS.into(), self.prompts.sha256().into());
        identity.insert(ENCODER.into(), self.encoder.clone().into());
        identity.insert("guidance".into(), guidance.into());
        identity.insert("guidance_scale".into(), scale);
        identity
    }

    /// Encodes all prompts, once.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be written; whatever the device says.
    pub(crate) fn prepare(&self) -> Result<()> {
        let Some(reader) = self.reader.take() else { return Ok(()) };
        let texts: Vec<&str> =
            std::iter::once("").chain(self.prompts.texts().iter().map(String::as_str)).collect();
        let encoded = texts.chunks(TOGETHER).map(|texts| encode(&reader, texts, self.shape));
        let table = match &self.file {
            None => {
                let parts: Vec<Tensor> = encoded.collect::<Result<_>>()?;
                Table::Memory(Tensor::cat(&parts, 0)?)
            }
            Some(path) => {
                let mut failed = None;
                let header = self.header()?;
                let written = write_with(path, |file| {
                    file.write_all(&header)?;
                    for states in encoded {
                        let values =
                            states.and_then(|states| Ok(states.flatten_all()?.to_vec1::<f32>()?));
                        match values {
                            Ok(values) => file.write_all(bytemuck::cast_slice(&values))?,
                            Err(error) => {
                                failed = Some(error);
                                return Err(std::io::Error::other("a prompt was not encoded"));
                            }
                        }
                    }
                    Ok(())
                });
                match failed {
                    Some(error) => return Err(error),
                    None => written?,
                }
                self.open(path)?
            }
        };
        self.table.get_or_init(|| table);
        Ok(())
    }

    /// Seconds that [`Prompting::prepare`] will take.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(crate) fn seconds(&self) -> Result<f64> {
        let reader = self.reader.borrow();
        let Some(reader) = reader.as_ref() else { return Ok(0.0) };
        let texts: Vec<&str> =
            self.prompts.texts().iter().take(TOGETHER).map(String::as_str).collect();
        // The first of a size is slower than those after it.
        encode(reader, &texts, self.shape)?;
        let began = Instant::now();
        encode(reader, &texts, self.shape)?;
        let each = began.elapsed().as_secs_f64() / texts.len() as f64;
        Ok(each * (self.prompts.texts().len() + 1) as f64)
    }

    /// Bytes of all states.
    pub(crate) fn bytes(&self) -> u64 {
        ((self.prompts.texts().len() + 1) * self.length() * size_of::<f32>()) as u64
    }

    /// The prompt of the trajectory with that seed, by its number.
    pub(crate) fn prompt(&self, seed: u64) -> usize {
        random::below(seed, Purpose::Prompt, 0, 0, self.prompts.texts().len())
    }

    /// The states of the prompts of the trajectories with these seeds, f32 `[seeds, tokens, width]`.
    ///
    /// # Errors
    /// As [`Prompting::states`].
    pub(crate) fn of_trajectories(&self, seeds: &[u64], device: &Device) -> Result<Tensor> {
        let rows: Vec<usize> = seeds.iter().map(|&seed| self.prompt(seed) + 1).collect();
        self.states(&rows, device)
    }

    /// What a student that takes the scale as an input is told of the trajectories with these seeds.
    ///
    /// # Errors
    /// As [`Prompting::states`].
    pub(crate) fn conditions(&self, seeds: &[u64], device: &Device) -> Result<TextConditions> {
        let scale = |&seed: &u64| (self.guidance.scale(seed) - 1.0) as f32;
        let guidance = Some(seeds.iter().map(scale).collect());
        Ok(TextConditions { prompts: self.of_trajectories(seeds, device)?, guidance })
    }

    /// The states of these prompts, by their numbers; of the empty one where there is none. f32 `[prompts, tokens, width]`.
    ///
    /// # Errors
    /// As [`Prompting::states`].
    pub(crate) fn of_prompts(&self, prompts: &[Option<usize>], device: &Device) -> Result<Tensor> {
        let rows: Vec<usize> = prompts.iter().map(|number| number.map_or(0, |it| it + 1)).collect();
        self.states(&rows, device)
    }

    /// Those of the empty prompt, so many times, f32 `[rows, tokens, width]`.
    ///
    /// # Errors
    /// As [`Prompting::states`].
    pub(crate) fn empty(&self, rows: usize, device: &Device) -> Result<Tensor> {
        Ok(self.states(&[0], device)?.repeat((rows, 1, 1))?)
    }

    /// Some of the prompts, evenly spaced, for samples that are looked at.
    ///
    /// # Errors
    /// As [`Prompting::states`].
    pub(crate) fn captions(&self, count: usize, device: &Device) -> Result<Captions> {
        let all = self.prompts.texts().len();
        let count = count.min(all);
        let rows: Vec<usize> = (0..count).map(|index| index * all / count + 1).collect();
        let scale = match self.guidance {
            Guidance::Keep { scale } => scale,
            Guidance::Distil { least, most } => f64::midpoint(least, most),
        };
        let texts = rows.iter().map(|row| self.prompts.texts()[row - 1].clone()).collect();
        Ok(Captions {
            texts,
            prompts: self.states(&rows, device)?,
            empty: self.states(&[0], device)?,
            scale,
        })
    }

    /// Rows of the table, f32 `[rows, tokens, width]`.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file; whatever the device says.
    fn states(&self, rows: &[usize], device: &Device) -> Result<Tensor> {
        let shape = (rows.len(), self.shape.tokens, self.shape.width);
        match self.table.get() {
            None => Err(Error::Weights("the prompts have not been encoded".into())),
            Some(Table::Memory(all)) => {
                let places: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
                let rows = all.index_select(&Tensor::new(places, all.device())?, 0)?;
                Ok(rows.reshape(shape)?.to_device(device)?)
            }
            Some(Table::File { file, path, start }) => {
                let bytes = self.length() * size_of::<f32>();
                let mut values = vec![0_f32; rows.len() * self.length()];
                let mut file = file;
                for (&row, values) in rows.iter().zip(values.chunks_exact_mut(self.length())) {
                    file.seek(SeekFrom::Start(start + (row * bytes) as u64))
                        .and_then(|_| file.read_exact(bytemuck::cast_slice_mut(values)))
                        .map_err(|source| Error::Io { path: path.clone(), source })?;
                }
                Ok(Tensor::from_vec(values, shape, device)?)
            }
        }
    }

    /// Numbers of one prompt.
    fn length(&self) -> usize {
        self.shape.tokens * self.shape.width
    }

    /// The beginning of the file.
    fn header(&self) -> Result<Vec<u8>> {
        let malformed = |problem: String| Error::Format {
            path: self.file.clone().unwrap_or_default(),
            problem,
        };
        let rows = self.prompts.texts().len() + 1;
        let shape = vec![rows, self.shape.tokens, self.shape.width];
        let data_offsets = (0, self.bytes() as usize);
        let info = TensorInfo { dtype: Dtype::F32, shape, data_offsets };
        let said = [(PROMPTS, self.prompts.sha256()), (ENCODER, self.encoder.clone())];
        let said = said.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let header = Metadata::new(Some(said), vec![(NAME.to_owned(), info)])
            .map_err(|error| malformed(error.to_string()))?;
        let mut header =
            serde_json::to_vec(&header).map_err(|error| malformed(error.to_string()))?;
        header.resize(header.len().next_multiple_of(8), b' ');
        Ok([&(header.len() as u64).to_le_bytes()[..], &header].concat())
    }

    /// The table of a file that is there.
    fn open(&self, path: &Path) -> Result<Table> {
        let remedy = "remove it, or name another --out";
        let (mut file, length) = read::open(path)?;
        let broken = || Error::Format {
            path: path.to_owned(),
            problem: format!("is no whole table of prompts; {remedy}"),
        };
        let mut size = [0; 8];
        file.read_exact(&mut size).map_err(|_| broken())?;
        let size = u64::from_le_bytes(size);
        if size > HEADER_LIMIT {
            return Err(broken());
        }
        let mut header = vec![0; size as usize];
        file.read_exact(&mut header).map_err(|_| broken())?;
        let header: Metadata = serde_json::from_slice(&header).map_err(|_| broken())?;
        let said = header.metadata().clone().unwrap_or_default();
        let own = [
            (ENCODER, self.encoder.clone(), "by another text encoder or tokenizer"),
            (PROMPTS, self.prompts.sha256(), "from other prompts"),
        ];
        for (name, own, what) in own {
            if said.get(name) != Some(&own) {
                let value = format!("a table of states made {what}");
                return Err(Error::value(path.display().to_string(), value, remedy));
            }
        }
        let start = 8 + size;
        match length == start + self.bytes() {
            true => Ok(Table::File { file, path: path.to_owned(), start }),
            false => Err(broken()),
        }
    }
}

impl Captions {
    /// Prompts as a pipeline's network is told them; `shape` is that of one.
    ///
    /// # Errors
    /// [`Error::Value`] naming a prompt that is longer than the text encoder takes; whatever the device says.
    pub fn new(reader: &Reader, prompts: &Prompts, shape: Prompt, scale: f64) -> Result<Self> {
        check_lengths(&reader.tokenizer, prompts, shape)?;
        let states = |texts: &[&str]| -> Result<Tensor> {
            let states = encode(reader, texts, shape)?;
            Ok(states.reshape((texts.len(), shape.tokens, shape.width))?)
        };
        let texts: Vec<&str> = prompts.texts().iter().map(String::as_str).collect();
        let parts = texts.chunks(TOGETHER).map(states).collect::<Result<Vec<_>>>()?;
        let prompts = Tensor::cat(&parts, 0)?;
        let texts = texts.into_iter().map(str::to_owned).collect();
        Ok(Self { texts, prompts, empty: states(&[""])?, scale })
    }
}

/// Refuses prompts of more tokens than fit.
fn check_lengths(tokenizer: &Tokenizer, prompts: &Prompts, shape: Prompt) -> Result<()> {
    for (index, text) in prompts.texts().iter().enumerate() {
        tokenizer.encode(text, shape.tokens).map_err(|error| match error {
            Error::Value { value, remedy, .. } => Error::value(prompts.place(index), value, remedy),
            error => error,
        })?;
    }
    Ok(())
}

/// The states of some prompts, f32 `[prompts, tokens · width]` on the CPU.
fn encode(reader: &Reader, texts: &[&str], shape: Prompt) -> Result<Tensor> {
    let ids = texts.iter().map(|text| reader.tokenizer.encode(text, shape.tokens));
    let ids: Vec<Vec<u32>> = ids.collect::<Result<_>>()?;
    let ids: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
    let row = |PromptStates { states, .. }: PromptStates| {
        // Tokens that a prompt does not have are zeros.
        let missing = shape.tokens.saturating_sub(states.dim(0)?);
        Ok(states.pad_with_zeros(0, 0, missing)?.flatten_all()?)
    };
    let rows = reader.encoder.read(&ids)?.into_iter().map(row);
    Ok(Tensor::stack(&rows.collect::<Result<Vec<_>>>()?, 0)?)
}

/// SHA-256 of files, with their names, in hexadecimal.
pub(crate) fn files_sha256(files: &[PathBuf]) -> Result<String> {
    let mut hash = Sha256::new();
    for path in files {
        let (mut file, length) = read::open(path)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        hash.update(format!("{name} {length}\n"));
        std::io::copy(&mut file, &mut hash)
            .map_err(|source| Error::Io { path: path.clone(), source })?;
    }
    Ok(hex(&hash.finalize()))
}
