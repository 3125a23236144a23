# fish completion for axlearn
function __axlearn_words
    axlearn completion words (commandline -cp | string collect) 2>/dev/null | string trim --right
end
complete -c axlearn -a '(__axlearn_words)'
